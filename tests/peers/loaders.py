"""Files for every loader function of SAELens' registry, with the keys that the loader expects; read by both.

`compare(name, root)` writes the files, lets SAELens' own function and hubsae read them, and says what came of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from hubsae.core.errors import FormatError
from hubsae.formats import read, read_cross_layer
from hubsae.formats.tensors import safetensors_header

D_IN, D_SAE, K, TOKENS = 32, 128, 6, 300
TOLERANCE = 1e-6
POST = "blocks.12.hook_resid_post"


class Files(NamedTuple):
    """What a loader is asked for, and how its files are made."""

    repo: str
    folder: str
    """What SAELens' function takes as the folder: a folder, or a file."""
    make: Callable[[Path], None]
    """Writes the files below the repo."""
    scale: float | None = None
    """The factor by which SAELens folds inputs that its registry says."""
    layer: int | None = None
    """The layer of a cross-layer transcoder, of which only latents can be compared."""


class Outcome(NamedTuple):
    """What came of one loader."""

    result: str
    latents: float | None = None
    """Largest difference, in units of the largest latent."""
    output: float | None = None
    """Relative difference."""


def _rand(*shape: int, scale: float = 0.3) -> Tensor:
    seed = sum(prime * n for prime, n in zip((7, 11, 13), shape, strict=False)) + len(shape)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _plain() -> dict[str, Tensor]:
    return {"W_enc": _rand(D_IN, D_SAE), "b_enc": _rand(D_SAE), "W_dec": _rand(D_SAE, D_IN), "b_dec": _rand(D_IN)}


def _linear(encoder: str = "encoder", decoder: str = "decoder") -> dict[str, Tensor]:
    return {f"{encoder}.weight": _rand(D_SAE, D_IN), f"{encoder}.bias": _rand(D_SAE),
            f"{decoder}.weight": _rand(D_IN, D_SAE), f"{decoder}.bias": _rand(D_IN)}  # fmt: skip


def _gemma() -> dict[str, Tensor]:
    t = _plain()
    return {"w_enc": t["W_enc"], "w_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"],
            "threshold": _rand(D_SAE).abs()}  # fmt: skip


def _npz(folder: str) -> Callable[[Path], None]:
    return lambda root: np.savez(_made(root / folder) / "params.npz", **{k: v.numpy() for k, v in _gemma().items()})


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _json(path: Path, value: Any) -> None:
    _made(path.parent)
    path.write_text(json.dumps(value))


def _torch(path: Path, value: Any) -> None:
    _made(path.parent)
    torch.save(value, path)


def _sae_lens(root: Path) -> None:
    about = {"sae_lens_version": "6.54.0", "hook_name": POST, "model_name": "gpt2-small"}
    cfg = {"architecture": "topk", "k": K, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
           "rescale_acts_by_decoder_norm": True, "metadata": about}  # fmt: skip
    _json(root / "one" / "cfg.json", cfg)
    save_file(_plain(), root / "one" / "sae_weights.safetensors")


def _connor(root: Path) -> None:
    _torch(root / "gpt2-small_L5_Hcat_z_lr1.pt", _plain())
    about = {"act_name": "blocks.5.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE}
    _json(root / "gpt2-small_L5_Hcat_z_lr1_cfg.json", about)


def _gemma_3(root: Path) -> None:
    save_file(_gemma(), _made(root / "resid_post/layer_12_width_16k_l0_small") / "params.safetensors")


def _llama_scope(root: Path) -> None:
    hyper = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": POST, "hook_point_out": POST, "act_fn": "jumprelu",
             "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise", "use_decoder_bias": True,
             "dataset_average_activation_norm": {"in": 7.0, "out": 7.0},
             "sparsity_include_decoder_norm": False}  # fmt: skip
    _json(root / "one" / "hyperparams.json", hyper)
    save_file(_linear(), _made(root / "one" / "checkpoints") / "final.safetensors")


def _llama_r1(root: Path) -> None:
    config = {"sae_type": "sae", "hook_point_in": POST, "hook_point_out": POST, "d_model": D_IN, "expansion_factor": 4,
              "act_fn": "jumprelu", "norm_activation": "dataset-wise", "use_decoder_bias": True,
              "sparsity_include_decoder_norm": False,
              "dataset_average_activation_norm": {"in": 7.0, "out": 7.0}}  # fmt: skip
    _json(root / "one" / "config.json", config)
    save_file(_linear() | {"log_jumprelu_threshold": _rand(D_SAE)}, root / "one" / "sae_weights.safetensors")


def _dictionary_learning(root: Path, dict_class: str = "BatchTopKSAE") -> None:
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 12, "k": K,
               "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_12"}  # fmt: skip
    _json(root / "one" / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    t = _linear()
    b_dec = t.pop("decoder.bias")
    if dict_class == "AutoEncoder":
        t |= {"bias": b_dec}
    elif dict_class == "GatedAutoEncoder":
        t = {k: v for k, v in t.items() if k != "encoder.bias"} | {"decoder_bias": b_dec}
        t |= {"gate_bias": _rand(D_SAE), "mag_bias": _rand(D_SAE, scale=0.2), "r_mag": _rand(D_SAE, scale=0.1)}
    elif dict_class == "JumpReluAutoEncoder":
        t = _plain() | {"threshold": _rand(D_SAE).abs()}
    else:
        t |= {"b_dec": b_dec, "k": torch.tensor(K), "threshold": torch.tensor(0.8)}
    _torch(root / "one" / "ae.pt", t)


def _qwen(root: Path) -> None:
    t = _linear()
    weights = {"W_enc": t["encoder.weight"], "b_enc": t["encoder.bias"], "W_dec": t["decoder.weight"]}
    _torch(root / "layer7.sae.pt", weights | {"b_dec": t["decoder.bias"]})


def _sparsify(root: Path) -> None:
    _json(root / "layers.5" / "cfg.json", {"d_in": D_IN, "num_latents": D_SAE, "k": K, "activation": "topk",
                                           "expansion_factor": 4, "normalize_decoder": True, "signed": False,
                                           "transcode": False, "skip_connection": False})  # fmt: skip
    t = _linear()
    save_file({"encoder.weight": t["encoder.weight"], "encoder.bias": t["encoder.bias"], "W_dec": _rand(D_SAE, D_IN),
               "b_dec": t["decoder.bias"]}, root / "layers.5" / "sae.safetensors")  # fmt: skip


def _mwhanna(root: Path) -> None:
    t = _plain()
    save_file(t | {"W_enc": t["W_enc"].t().contiguous()}, _made(root) / "layer_7.safetensors")
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    (root / "config.yaml").write_text(yaml.safe_dump({"model_name": "Qwen/Qwen3-8B", **hooks}))
    sizes = {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 128}}
    (root / "wanb-config.yaml").write_text(yaml.safe_dump(sizes))


def _mntss(root: Path) -> None:
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    _made(root)
    (root / "config.yaml").write_text(yaml.safe_dump({"model_name": "google/gemma-2-2b", **hooks}))
    for n in range(3):
        encoder = {f"W_enc_{n}": _rand(D_SAE, D_IN), f"b_enc_{n}": _rand(D_SAE), f"b_dec_{n}": _rand(D_IN)}
        save_file(encoder, root / f"W_enc_{n}.safetensors")
        save_file({f"W_dec_{n}": _rand(D_SAE, 3 - n, D_IN)}, root / f"W_dec_{n}.safetensors")


def _temporal(root: Path) -> None:
    sae = {"exp_factor": D_SAE / D_IN, "n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 1,
           "sae_diff_type": "topk", "kval_topk": K, "tied_weights": True, "scaling_factor": 1.0}  # fmt: skip
    folder = _made(root / "layer_12" / "temporal")
    (folder / "conf.yaml").write_text(
        yaml.safe_dump({"llm": {"dimin": D_IN}, "sae": sae, "data": {"dtype": "float32"}})
    )
    save_file({"D": _rand(D_SAE, D_IN), "b": _rand(D_IN)}, folder / "latest_ckpt.safetensors")


NORM = math.sqrt(D_IN) / 7.0
FILES: dict[str, Files] = {
    "sae_lens": Files("someone/saes", "one", _sae_lens),
    "connor_rob_hook_z": Files("ckkissane/attn-saes-gpt2-small-all-layers", "gpt2-small_L5_Hcat_z_lr1.pt", _connor),
    "gemma_2": Files(
        "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_71", _npz("layer_12/width_16k/average_l0_71")
    ),
    "gemma_3": Files("google/gemma-scope-2-270m-pt", "resid_post/layer_12_width_16k_l0_small", _gemma_3),
    "llama_scope": Files("fnlp/Llama3_1-8B-Base-LXR-8x", "one", _llama_scope, NORM),
    "llama_scope_r1_distill": Files("fnlp/Llama-Scope-R1-Distill", "one", _llama_r1, NORM),
    "dictionary_learning_1": Files("canrager/lm_sae", "one", _dictionary_learning),
    **{
        f"dictionary_learning_1 {name}": Files("canrager/lm_sae", "one", partial(_dictionary_learning, dict_class=name))
        for name in ("AutoEncoder", "AutoEncoderTopK", "GatedAutoEncoder", "JumpReluAutoEncoder")
    },
    "deepseek_r1": Files(
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        lambda root: _torch(root / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", _linear()),
    ),
    "qwen_scope": Files(f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer7.sae.pt", _qwen),
    "sparsify": Files("EleutherAI/sae-pythia-70m-32k", "layers.5", _sparsify),
    "gemma_2_transcoder": Files(
        "google/gemma-scope-2b-pt-transcoders", "layer_20/width_16k/average_l0_71",
        _npz("layer_20/width_16k/average_l0_71"),
    ),
    "mwhanna_transcoder": Files("mwhanna/qwen3-8b-transcoders", "layer_7.safetensors", _mwhanna),
    "mntss_clt_layer_transcoder": Files("mntss/clt-gemma-2-2b-426k", "1", _mntss, layer=1),
    "temporal": Files("canrager/temporalSAEs", "layer_12/temporal", _temporal),
    "goodfire": Files(
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth",
        lambda root: _torch(root / "Llama-3.1-8B-Instruct-SAE-l19.pth", _linear("encoder_linear", "decoder_linear")),
    ),
}  # fmt: skip


@contextmanager
def _files_in_place_of_downloads(root: Path) -> Iterator[Any]:
    """SAELens' loaders, with the files of `root` where they would download."""
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        file = root / repo_id.replace("/", "--") / (subfolder or "") / filename
        if not file.is_file():
            raise EntryNotFoundError(str(file))
        return str(file)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(shape) for name, (_, shape) in safetensors_header(download(repo_id, filename)).items()}

    before = {name: getattr(loaders, name) for name in ("hf_hub_download", "get_safetensors_tensor_shapes")}
    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = download, shapes
    try:
        yield loaders
    finally:
        for name, function in before.items():
            setattr(loaders, name, function)


def by_saelens(name: str, root: Path) -> tuple[Any, str | None]:
    """The SAE that SAELens' loader function makes of the files, and its hook point; widths are those of the files."""
    from sae_lens import SAE

    case = FILES[name]
    with _files_in_place_of_downloads(root) as loaders:
        loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[name.partition(" ")[0]]
        cfg, state, _ = loader(case.repo, case.folder, device="cpu", cfg_overrides={"dtype": "float32"})
        widths = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"} | ({"d_out": D_IN} if "d_out" in cfg else {})
        hook = cfg.get("hook_name") or cfg.get("metadata", {}).get("hook_name")
        cfg = loaders.handle_config_defaulting(dict(cfg | widths))
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    lens = SAE.load_from_disk("unused", converter=lambda path, device, cfg_overrides: (cfg, state))
    if case.scale is not None:
        lens.fold_activation_norm_scaling_factor(case.scale)
    if lens.cfg.reshape_activations == "hook_z":
        lens.turn_off_forward_pass_hook_z_reshaping()  # the heads lie side by side already
    return lens, hook


def compare(name: str, root: Path) -> Outcome:
    """Read the files of one loader with SAELens and with hubsae."""
    case, x = FILES[name], _rand(TOKENS, D_IN, scale=1.0)
    root = root / name.replace(" ", "-")
    here = _made(root / case.repo.replace("/", "--"))
    case.make(here)
    hook = None
    try:
        lens, hook = by_saelens(name, root)
    except (RuntimeError, KeyError, ValueError) as error:
        lens = error
    try:
        sae = read(here if case.layer is not None else here / case.folder)
    except FormatError as error:
        if case.layer is not None and not isinstance(lens, Exception):
            # what SAELens has is one layer with its decoders summed: its latents are those of the layer
            with torch.no_grad():
                mine, theirs = read_cross_layer(here).layer(case.layer).encode(x), lens.encode(x)
            return Outcome("equal latents (read_cross_layer)", *_far(mine, theirs), None)
        both = "" if isinstance(lens, Exception) else "; SAELens loads it"
        return Outcome(f"refused by name ({error.hint}){both}")
    if isinstance(lens, Exception):
        return Outcome(f"read; SAELens' loader fails ({type(lens).__name__})")
    with torch.no_grad():
        mine, theirs = sae.encode(x), lens.encode(x)
        latents = _far(mine, theirs)[0]
        output = float((sae(x) - lens(x)).norm() / lens(x).norm())
    place = sae.metadata.hook.transformer_lens == hook
    same = place and bool(((mine != 0) == (theirs != 0)).all()) and latents <= 2e-5 and output <= TOLERANCE
    return Outcome("equal" if same else "DIFFERENT" if place else "ANOTHER PLACE", latents, output)


def _far(mine: Tensor, theirs: Tensor) -> tuple[float]:
    return (float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1)),)
