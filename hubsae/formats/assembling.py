"""From what a reader found to an SAE: names checked, matrices turned, normalisers folded, the record written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, FormatError
from hubsae.core.fold import TrainedTensors, fold
from hubsae.core.hooks import hook_record
from hubsae.core.metadata import DecoderFlags, Metadata, NormalizerInfo, describe_validation
from hubsae.core.normalizer import Normalizer
from hubsae.core.sae import SAE
from hubsae.core.text import stage_step
from hubsae.formats import tensors as io
from hubsae.formats.base import Overrides, Probe, ReadWarning
from hubsae.version import __version__


@dataclass
class Found:
    """What a reader found out; `assemble` turns it into a HubSAE."""

    format: str
    path: Path
    trained: TrainedTensors
    architecture: str
    k: int | None = None
    topk_relu: bool = True
    batch_threshold: float | None = None
    threshold: Tensor | None = None
    """jumprelu: [d_sae]."""
    mean: Tensor | None = None
    std: Tensor | None = None
    keep_normalizer: bool = False
    """Whether mean and std are statistics worth keeping beside the weights."""
    count: int = 0
    token_norm: str = "none"
    sparsity: Tensor | None = None
    transcoder: bool = False
    """Whether it predicts another hook point; then nothing is subtracted and its decoder may have another width."""
    output: tuple[Tensor, Tensor] | None = None
    """Transcoders: mean and std of what is predicted, where it was normalised in training."""
    hook_out: str | None = None
    layer: int | None = None
    stage: str | None = None
    hook: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    flags: DecoderFlags = field(default_factory=DecoderFlags)
    normalizer_note: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    """Further parts of the metadata record: training, activations, metrics, hook, base_model."""


def assemble(found: Found, choices: Overrides) -> SAE:
    """Fold what was found into the canonical form, check it, and write down what is known of it."""
    found = _chosen(found, choices)
    trained = _float32(found.path, found.trained)
    _check_shapes(found, trained)
    d_in, d_sae = trained.W_enc.shape
    d_out = trained.W_dec.shape[1] if found.transcoder else None
    parts = trained._asdict() | trained.encoder_biases
    parts |= {"threshold": found.threshold, "mean": found.mean, "std": found.std}
    given = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    io.ensure_finite(found.path, given)
    _check_std(found)
    tensors, subtract = fold(trained, found.mean, found.std, output=found.output, transcoder=found.transcoder)
    if found.threshold is not None:
        tensors["threshold"] = found.threshold.float().contiguous()
    tensors = io.owned(found.path, tensors, given.values())
    config = make_config(
        found.path,
        architecture=found.architecture,
        d_in=d_in,
        d_sae=d_sae,
        k=found.k,
        topk_relu=found.topk_relu,
        threshold=found.batch_threshold,
        apply_b_dec_to_input=subtract,
        token_norm=found.token_norm,
        d_out=d_out,
        skip=True if trained.W_skip is not None else None,
    )
    if found.architecture == "batch_topk" and found.batch_threshold is None:
        warnings.warn(
            f"{found.path.name}: no inference threshold is stored, so latents are selected over each batch and "
            "depend on it (store one with threshold=..., or estimate it with hubsae.formats.estimate_threshold)",
            ReadWarning,
            stacklevel=4,
        )
    normalizer = None
    if found.keep_normalizer and found.std is not None:
        mean = torch.zeros(d_in) if found.mean is None else found.mean.float().expand(d_in).contiguous()
        normalizer = Normalizer(mean, found.std.float().expand(d_in).contiguous(), found.count)
    metadata = _record(found, choices, config, normalizer)
    return SAE.build(config, tensors, metadata=metadata, normalizer=normalizer, sparsity=found.sparsity)


def make_config(path: Path, **values: Any) -> SAEConfig:
    """SAEConfig, with an error that names the file."""
    try:
        return SAEConfig(**values)
    except ValidationError as error:
        missing_k = values.get("k") is None and values.get("architecture") in ("topk", "batch_topk")
        raise ConfigError(
            f"{path}: {describe_validation(error)}",
            hint="k is not in the file or its name: give k=... (command line: -s k=64)" if missing_k else None,
        ) from error


_SAID_OF_IT = frozenset(Overrides.__annotations__) & frozenset(Found.__annotations__) - {"threshold"}
"""Choices that take the place of what a reader found; its threshold is that of a JumpReLU, one per latent."""


def _chosen(found: Found, choices: Overrides) -> Found:
    """Apply the choices that are not about the layout (those the reader itself applied)."""
    new = {name: value for name, value in choices.named().items() if name in _SAID_OF_IT}
    if choices.threshold is not None:
        new["batch_threshold"] = choices.threshold
    if choices.input_scale is not None:
        d_in = found.trained.W_enc.shape[0]
        new["std"] = torch.full((d_in,), 1 / choices.input_scale, dtype=torch.float64)
        new["mean"] = torch.zeros(d_in, dtype=torch.float64)
        new["normalizer_note"] = f"inputs were multiplied by {choices.input_scale:g} in training; folded"
    return replace(found, **new)


def _float32(path: Path, trained: TrainedTensors) -> TrainedTensors:
    def wide(name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in io.FLOATS:
            raise FormatError(path, f"{name} in floating point", str(tensor.dtype).removeprefix("torch."))
        return tensor.detach().float()

    parts = {name: wide(name, part) for name, part in trained._asdict().items() if isinstance(part, Tensor)}
    biases = {name: wide(name, bias) for name, bias in trained.encoder_biases.items()}
    return trained._replace(encoder_biases=biases, **parts)


def _check_shapes(found: Found, trained: TrainedTensors) -> None:
    path = found.path
    for name, matrix in (("W_enc", trained.W_enc), ("W_dec", trained.W_dec)):
        if matrix.ndim != 2:
            raise FormatError(
                path,
                f"{name} with two dimensions",
                f"shape {tuple(matrix.shape)}",
                hint="crosscoders and cross-layer transcoders have a third; load them with the tool that made them",
            )
    d_in, d_sae = trained.W_enc.shape
    d_out = trained.W_dec.shape[1] if found.transcoder else d_in
    rows = [("W_dec", trained.W_dec, (d_sae, d_out)), ("b_dec", trained.b_dec, (d_out,))]
    rows += [("the pre-bias", trained.pre_bias, (d_in,)), ("r_mag", trained.r_mag, (d_sae,))]
    rows += [(name, bias, (d_sae,)) for name, bias in trained.encoder_biases.items()]
    rows += [("threshold", found.threshold, (d_sae,)), ("W_skip", trained.W_skip, (d_out, d_in))]
    for name, tensor, shape in rows:
        if tensor is not None and tuple(tensor.shape) != shape:
            turned = tuple(tensor.shape) == shape[::-1] and len(shape) == 2
            raise FormatError(
                path,
                f"{name} of shape {shape} (the encoder is d_in={d_in}, d_sae={d_sae})",
                f"{tuple(tensor.shape)}" + (", which is transposed" if turned else ""),
                hint="the file mixes layouts or widths; `hubsae show` lists its tensors",
            )


def _check_std(found: Found) -> None:
    if found.std is not None and (bad := int((found.std <= 0).sum())):
        raise FormatError(
            found.path,
            "standard deviations above zero in the normaliser",
            f"{bad} of {found.std.numel()} that are not",
            hint="constant dimensions must have std 1",
        )


def _record(found: Found, choices: Overrides, config: SAEConfig, normalizer: Normalizer | None) -> Metadata:
    record: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in found.record.items()}
    base = record.setdefault("base_model", {})
    for key, value in (("id", found.base_model), ("revision", found.base_model_revision), ("stage", found.stage)):
        if value is not None:
            base[key] = value
    if "step" not in base and (step := stage_step(base.get("stage"))) is not None:
        base["step"] = step
    record["hook"] = hook_record(found.hook, found.layer, base.get("id")) | record.get("hook", {})
    if config.is_transcoder:
        record["hook_out"] = hook_record(found.hook_out, None, base.get("id")) | record.get("hook_out", {})
    record["config"] = config
    record["decoder"] = found.flags.model_copy(update={"overridden": choices.of_reading()})
    if "normalizer" not in record:
        record["normalizer"] = _normalizer_info(found, normalizer)
    provenance = record.setdefault("provenance", {})
    provenance.setdefault("source_file", found.path.name)
    provenance.setdefault("source_format", found.format)
    provenance.setdefault("converter", f"hubsae {__version__}")
    return Metadata.from_dict({k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in record.items()})


def _normalizer_info(found: Found, normalizer: Normalizer | None) -> NormalizerInfo:
    if found.token_norm != "none":
        return NormalizerInfo(kind=found.token_norm, folded=False, note=found.normalizer_note)  # pyright: ignore[reportArgumentType]
    if found.std is None:
        return NormalizerInfo(note=found.normalizer_note)
    flat = found.std.flatten()
    scalar = bool((flat == flat[0]).all()) and found.mean is not None and not bool(found.mean.any())
    return NormalizerInfo(
        kind="scalar" if scalar else "mean_std",
        folded=True,
        file="normalizer.safetensors" if normalizer is not None else None,
        note=found.normalizer_note,
    )


def expect_keys(path: Path, found: Iterable[str], required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuse missing and unexpected tensors, naming them."""
    have, need = set(found), set(required)
    missing, extra = sorted(need - have), sorted(have - need - set(optional))
    if missing or extra:
        parts = [f"without {', '.join(missing)}"] if missing else []
        parts += [f"with {', '.join(extra)} besides"] if extra else []
        raise FormatError(path, f"the tensors {', '.join(sorted(need))}", f"a file {' and '.join(parts)}")


def named_tensors(
    probe: Probe,
    tensors: dict[str, Tensor],
    choices: Overrides,
    name: str,
    about: Mapping[str, Any],
    flags: DecoderFlags | None = None,
) -> SAE:
    """An SAE from tensors of canonical name and orientation that say nothing more of themselves.

    `about` is what is known beside the file: architecture, k, subtract, hook, layer, base_model. What neither it nor
    the caller says is asked for.
    """
    architecture = "gated" if "b_gate" in tensors else "jumprelu" if "threshold" in tensors else None
    architecture = architecture or choices.architecture or about.get("architecture") or probe.name.architecture
    if architecture is None:
        hint = "give architecture=topk and k=64, or architecture=relu (command line: -s architecture=topk -s k=64)"
        raise _untold(probe, "how latents are selected", hint)
    pre, bias = tensors.get("pre_bias"), tensors.get("b_dec")
    transcoder = choices.hook_out is not None or "W_skip" in tensors
    if pre is None and not transcoder:
        said = choices.apply_b_dec_to_input
        subtract = about.get("subtract") if said is None else said
        if subtract is None:
            hint = "give apply_b_dec_to_input=True or False (command line: -s apply_b_dec_to_input=true)"
            raise _untold(probe, "whether b_dec is subtracted before encoding", hint)
        pre = bias if subtract else None
    elif pre is not None:
        adds = choices.decode_adds_b_pre
        if bias is None:
            bias = pre * 0 if adds is False else pre
        elif adds is None:
            hint = "give decode_adds_b_pre=True or False (command line: -s decode_adds_b_pre=false)"
            raise _untold(probe, "whether decoding adds the pre-bias to b_dec", hint)
        elif adds:
            bias = (bias.double() + pre.double()).to(bias.dtype)
    if bias is None:
        raise FormatError(probe.path, "b_dec or pre_bias", f"only {', '.join(sorted(tensors))}")
    biases = {key: tensors[key] for key in ("b_enc", "b_gate", "b_mag") if key in tensors}
    return assemble(
        Found(
            format=name,
            path=probe.path,
            trained=TrainedTensors(
                tensors["W_enc"], tensors["W_dec"], bias, pre, biases, tensors.get("r_mag"), tensors.get("W_skip")
            ),
            architecture=architecture,
            k=about.get("k") or probe.name.k,
            threshold=tensors.get("threshold"),
            transcoder=transcoder,
            layer=about.get("layer", probe.name.layer),
            stage=probe.name.stage,
            hook=about.get("hook"),
            base_model=about.get("base_model"),
            flags=flags or DecoderFlags(),
        ),
        choices,
    )


def _untold(probe: Probe, what: str, hint: str) -> FormatError:
    return FormatError(probe.path, f"to be told {what}", "tensors that do not say", hint=hint)


def with_b_dec(sae: SAE, subtracted: bool) -> dict[str, Tensor]:
    """The tensors of the same SAE where b_dec is subtracted before encoding, or is not."""
    t = sae.tensors()
    biases = {name: t[name] for name in ("b_enc", "b_gate", "b_mag") if name in t}
    pre = t["b_dec"] if sae.config.apply_b_dec_to_input else None
    now = TrainedTensors(t["W_enc"], t["W_dec"], t["b_dec"], pre, biases, t.get("r_mag"))
    return t | fold(now, apply_b_dec_to_input=subtracted)[0]


def statistic(path: Path, name: str, value: Any, width: int) -> Tensor:
    """A mean or deviation per dimension, from `width` numbers or one for all, in float64."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(path, f"{name} as numbers", str(error)) from error
    if tensor.numel() not in (1, width):
        raise FormatError(path, f"{name} of width {width} or one", str(tensor.numel()))
    return tensor.expand(width)


def linear_pair(path: Path, encoder: Tensor, decoder: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """`nn.Linear` weights (encoder [d_sae, d_in], decoder [d_in, d_sae]) as canonical views."""
    if encoder.ndim != 2 or decoder.ndim != 2:
        raise FormatError(path, "matrices", f"shapes {tuple(encoder.shape)} and {tuple(decoder.shape)}")
    if encoder.shape[1] != d_in or decoder.shape[0] != d_in or encoder.shape[0] != decoder.shape[1]:
        turned = encoder.shape[0] == d_in and decoder.shape[1] == d_in
        raise FormatError(
            path,
            f"encoder.weight [d_sae, {d_in}] and decoder.weight [{d_in}, d_sae] (the biases have width {d_in})",
            f"{tuple(encoder.shape)} and {tuple(decoder.shape)}" + (", both transposed" if turned else ""),
        )
    return encoder.t(), decoder.t()


def orient(
    path: Path, W_enc: Tensor, W_dec: Tensor, d_in: int, d_sae: int, transposed: bool | None
) -> tuple[Tensor, Tensor, DecoderFlags]:
    """Canonical views of two matrices whose layout only their shapes tell, and that layout; square ones are refused.

    Each may be stored either way: the encoder as [d_in, d_sae] or [d_sae, d_in], the decoder likewise.
    """
    if d_in == d_sae and transposed is None:
        raise FormatError(
            path,
            "matrices whose shape tells their orientation",
            f"square ones ({d_in} x {d_sae})",
            hint="say which it is: transposed=False for W_enc [d_in, d_sae], transposed=True for [d_sae, d_in]",
        )
    views, layouts = [], []
    for name, matrix, shape in (("W_enc", W_enc, (d_in, d_sae)), ("W_dec", W_dec, (d_sae, d_in))):
        turn = transposed if d_in == d_sae else tuple(matrix.shape) == shape[::-1]
        if tuple(matrix.shape) not in (shape, shape[::-1]):
            raise FormatError(path, f"{name} of shape {shape} or its transpose", str(tuple(matrix.shape)))
        views.append(matrix.t() if turn else matrix)
        layouts.append("[d_sae, d_in]" if (name == "W_enc") == bool(turn) else "[d_in, d_sae]")
    return views[0], views[1], DecoderFlags(encoder_orientation=layouts[0], decoder_orientation=layouts[1])
