"""One SAE, ready to run: the maths. Parameters are named and oriented as in SAELens.

Users get a `hubsae.HubSAE` (`hub/sae.py`), which adds what needs a model or the Hub; the rooms below the Hub make
theirs with `SAE.build`, which gives that class whoever calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from hubsae.core import factory
from hubsae.core.codes import SparseCodes
from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError
from hubsae.core.fingerprint import Fingerprint
from hubsae.core.metadata import Metadata
from hubsae.core.normalizer import Normalizer
from hubsae.kernels import inference

# Norms below this are treated as this, so that an all-zero token does not divide by zero.
NORM_FLOOR = 1e-8
LAYER_NORM_EPS = 1e-5


class SAE(nn.Module):
    """A sparse autoencoder in the canonical form.

        c    = b_dec if config.apply_b_dec_to_input else 0
        pre  = (x - c) @ W_enc + b_enc
        x̂    = select(pre) @ W_dec + b_dec

    Or a transcoder (`config.d_out`): the same between two hook points, with c = 0 and, where there is a skip matrix,
    `+ x @ W_skip.T` (W_skip is [d_out, d_in], as SAELens stores it).

    >>> config = SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2)
    >>> sae = SAE.random(config, seed=0)
    >>> codes = sae.encode_sparse(torch.randn(3, 4))
    >>> codes.indices.shape, sae(torch.randn(3, 4)).shape
    (torch.Size([3, 2]), torch.Size([3, 4]))
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_enc: nn.Parameter
    threshold: nn.Parameter
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter
    W_skip: nn.Parameter
    fingerprint: Fingerprint | None = None
    """Activations of a short text where it was trained, to check a model with; most SAEs have none."""

    def __init__(
        self,
        config: SAEConfig,
        tensors: dict[str, Tensor],
        *,
        metadata: Metadata | None = None,
        normalizer: Normalizer | None = None,
        sparsity: Tensor | None = None,
        features: Sequence[int] | None = None,
    ):
        super().__init__()
        missing = [name for name in config.tensor_names if name not in tensors]
        extra = [name for name in tensors if name not in config.tensor_names]
        if missing or extra:
            raise ConfigError(
                f"a {config.architecture} SAE has the tensors {', '.join(config.tensor_names)}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; not part of it: {', '.join(extra)}" if extra else "")
            )
        for name in config.tensor_names:
            found, expected = tuple(tensors[name].shape), config.tensor_shape(name)
            if found != expected:
                turned = " (transposed?)" if found == expected[::-1] and len(found) == 2 else ""
                raise ConfigError(f"{name} has shape {found}, expected {expected}{turned}")
            self.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))
        self.config = config
        self.metadata = metadata if metadata is not None else Metadata(config=config)
        self.normalizer = normalizer
        self.sparsity = sparsity
        self.features = None if features is None else tuple(int(f) for f in features)

    # ---- what it is -------------------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents held (of those asked for, after `features=`)."""
        return self.config.d_sae

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; inputs are cast to it."""
        return self.W_dec.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The canonical tensors by name."""
        return {name: getattr(self, name).detach() for name in self.config.tensor_names}

    def extra_repr(self) -> str:
        """Shown by print(sae)."""
        hook, out = self.metadata.hook, self.metadata.hook_out
        where = hook.module_path or hook.transformer_lens or "unknown hook point"
        if self.config.is_transcoder:
            target = None if out is None else out.module_path or out.transformer_lens
            where += f" -> {target or 'unknown hook point'}, d_out={self.config.d_out}"
            where += ", with a skip matrix" if self.config.skip else ""
        return f"{self.config.selection}, d_in={self.d_in}, d_sae={self.d_sae}, {where}, {self.dtype}, {self.device}"

    # ---- what it computes -------------------------------------------------------------------------------

    def pre_activations(self, x: Tensor) -> Tensor:
        """Encoder output before the selection [..., d_sae]; for gated SAEs, the gate's."""
        flat, _, _ = self._normed(x)
        return self._pre(flat).reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Tensor, *, sorted: bool = True) -> SparseCodes:
        """Active latents of x [..., d_in]; what every fast path uses.

        Top-k codes come largest first; where order does not matter, `sorted=False` saves the sorting.
        """
        flat, mean, scale = self._normed(x)
        values, indices = self._select(flat, sorted)
        skip = flat @ self.W_skip.t() if self.config.skip else None
        return SparseCodes(indices, values, self.d_sae, mean, scale, skip).reshape(*x.shape[:-1])

    def encode(self, x: Tensor) -> Tensor:
        """Dense codes [..., d_sae], as SAELens users expect them."""
        codes = self.encode_sparse(x, sorted=False)
        if self.config.architecture != "topk":
            return codes.dense()
        # no padding, so indices of a row differ: writing is enough and faster than adding
        out = codes.values.new_zeros(*codes.values.shape[:-1], self.d_sae)
        return out.scatter_(-1, codes.indices, codes.values)

    def decode(self, codes: SparseCodes | Tensor) -> Tensor:
        """Reconstruction of sparse or dense codes [..., d_in]; of a transcoder, its prediction [..., d_out]."""
        if isinstance(codes, SparseCodes):
            lead = codes.values.shape[:-1]
            flat = codes.reshape(-1)
            out = inference.decode_rows(flat.indices, flat.values.to(self.dtype), self.W_dec, self.b_dec)
            if flat.token_scale is not None and flat.token_mean is not None:
                out = out * flat.token_scale + flat.token_mean
            if flat.skip is not None:
                out = out + flat.skip
            return out.reshape(*lead, self.config.width_out)
        if self.config.skip or self.config.token_norm != "none":
            norm = f"normalises each token ({self.config.token_norm}) and undoes that when it decodes"
            what = "adds a function of its input to what it decodes" if self.config.skip else norm
            raise ConfigError(
                f"this SAE {what}, and a dense code does not hold it",
                hint="decode the SparseCodes of encode_sparse(x), which carry what is needed, or call sae(x)",
            )
        return codes.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [..., d_in]; of a transcoder, what it predicts [..., d_out]."""
        return self.decode(self.encode_sparse(x))

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if x.shape[-1] != self.d_in:
            raise ConfigError(f"activations have width {x.shape[-1]}, this SAE takes {self.d_in}")
        flat = x.reshape(-1, self.d_in).to(self.dtype)
        norm = self.config.token_norm
        if norm == "none":
            return flat, None, None
        mean = flat.new_zeros(flat.shape[0], 1)
        if norm == "layer_norm":
            mean = flat.mean(-1, keepdim=True)
            # the epsilon guards only the way in; this is how the releases that use it were trained
            scale = (flat - mean).std(-1, keepdim=True)
            return (flat - mean) / (scale + LAYER_NORM_EPS), mean, scale
        scale = flat.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        if norm == "constant_norm":
            scale = scale / self.d_in**0.5
        return flat / scale, mean, scale

    def _pre(self, flat: Tensor) -> Tensor:
        bias = self.b_gate if self.config.architecture == "gated" else self.b_enc
        centred = flat - self.b_dec if self.config.apply_b_dec_to_input else flat
        return inference.encode_linear(centred, self.W_enc, bias)

    def _select(self, flat: Tensor, sorted: bool) -> tuple[Tensor, Tensor]:
        """Values and indices [tokens, width] of the active latents."""
        config = self.config
        if self.features is not None:
            config.check_feature_subset()
        if config.architecture == "topk":
            center = self.b_dec if config.apply_b_dec_to_input else None
            values, indices = inference.encode_topk(flat, self.W_enc, self.b_enc, config.k or 0, center, sorted=sorted)
            return (values.relu() if config.topk_relu else values), indices
        if config.architecture == "gated":
            gate = self._pre(flat)
            # (pre of the magnitude) = (gate - b_gate) * exp(r_mag) + b_mag, one product for both
            z = ((gate - self.b_gate) * self.r_mag.exp() + self.b_mag).relu()
            return inference.select_ragged((gate > 0) & (z > 0), z)
        pre = self._pre(flat)
        if config.architecture == "relu":
            active = pre > 0
        elif config.architecture == "jumprelu":
            active = (pre > self.threshold) & (pre > 0)
        elif config.threshold is not None:
            active = (pre > config.threshold) & (pre > 0)
        else:
            active = inference.batch_topk_mask(pre, config.k or 0)
        return inference.select_ragged(active, pre)

    # ---- making one -------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        config: SAEConfig,
        tensors: dict[str, Tensor],
        *,
        metadata: Metadata | None = None,
        normalizer: Normalizer | None = None,
        sparsity: Tensor | None = None,
        features: Sequence[int] | None = None,
    ) -> Self:
        """An SAE of the class that users get, with `from_pretrained`, `push_to_hub` and the rest; as `SAE(...)`."""
        return factory.user_class(cls)(
            config, tensors, metadata=metadata, normalizer=normalizer, sparsity=sparsity, features=features
        )

    @classmethod
    def random(cls, config: SAEConfig, *, seed: int = 0) -> Self:
        """An untrained SAE with unit-norm decoder rows and a tied encoder, for tests and as a start."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.randn(config.d_sae, config.width_out, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        tensors = {name: torch.zeros(config.tensor_shape(name)) for name in config.tensor_names}
        tensors["W_dec"], tensors["W_enc"] = W_dec, W_dec.t().contiguous()
        if config.is_transcoder:  # nothing to tie: its two sides are different activations
            encoder = torch.randn(config.d_in, config.d_sae, generator=generator)
            tensors["W_enc"] = encoder / encoder.norm(dim=0)
        if "threshold" in tensors:
            tensors["threshold"] += 0.1
        dtype = getattr(torch, config.dtype)
        return cls.build(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
