"""Cross-layer transcoders: the latents of a layer write to the output of that layer and every later one.

    z[l] = select(x[l] @ W_enc[l] + b_enc[l])
    y[m] = Σ_{l <= m} z[l] @ W_dec[l, m] + b_dec[m] (+ x[m] @ W_skip[m].T)

Each layer is a transcoder whose decoder is as wide as all the outputs it writes to, side by side, so its codes,
selection and decoding are those of every other SAE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hubsae.core.codes import SparseCodes
from hubsae.core.config import SAEConfig
from hubsae.core.errors import ConfigError, HookError
from hubsae.core.hooks import HookPoint, edit_hook, read_hook
from hubsae.core.sae import SAE


class CrossLayerTranscoder(nn.Module):
    """One object over all layers of a model; inputs and outputs are lists by layer.

    >>> g = torch.Generator().manual_seed(0)
    >>> layers = [{"W_enc": torch.randn(4, 16, generator=g), "b_enc": torch.zeros(16), "b_dec": torch.zeros(4),
    ...            "W_dec": torch.randn(16, 3 - l, 4, generator=g)} for l in range(3)]
    >>> clt = CrossLayerTranscoder(layers)
    >>> [y.shape for y in clt([torch.randn(5, 4) for _ in range(3)])]
    [torch.Size([5, 4]), torch.Size([5, 4]), torch.Size([5, 4])]
    """

    def __init__(
        self,
        layers: Sequence[dict[str, Tensor]],
        *,
        hooks: Sequence[HookPoint] = (),
        hooks_out: Sequence[HookPoint] = (),
        base_model: str | None = None,
    ):
        """`layers` has per layer W_enc [d_in, d_sae], b_enc, W_dec [d_sae, outputs, d_out], where `outputs` counts this
        layer and all later ones, b_dec [d_out], and where there are any threshold [d_sae], W_skip [d_out, d_in]."""
        super().__init__()
        parts, biases, skips = [], [], []
        for number, tensors in enumerate(layers):
            (d_in, d_sae), (rows, outputs, d_out) = tensors["W_enc"].shape, tensors["W_dec"].shape
            if rows != d_sae or outputs != len(layers) - number:
                raise ConfigError(
                    f"W_dec of layer {number} is {tuple(tensors['W_dec'].shape)}, expected ({d_sae}, "
                    f"{len(layers) - number}, d_out): one decoder for this layer and each later one"
                )
            jump = "threshold" in tensors
            config = SAEConfig(
                architecture="jumprelu" if jump else "relu", d_in=d_in, d_sae=d_sae, d_out=outputs * d_out
            )
            own = {"W_enc": tensors["W_enc"], "b_enc": tensors["b_enc"], "W_dec": tensors["W_dec"].flatten(1)}
            own |= {"b_dec": tensors["b_dec"].new_zeros(outputs * d_out)}
            parts.append(SAE(config, own | ({"threshold": tensors["threshold"]} if jump else {})))
            biases.append(tensors["b_dec"])
            skips.append(tensors.get("W_skip"))
        self.layers = nn.ModuleList(parts)
        self.b_dec = nn.Parameter(torch.stack(biases), requires_grad=False)  # [layers, d_out]
        kept = [skip for skip in skips if skip is not None]
        if kept and len(kept) < len(skips):
            raise ConfigError(f"{len(kept)} of {len(skips)} layers have a skip matrix: all or none")
        self.W_skip = nn.Parameter(torch.stack(kept), requires_grad=False) if kept else None
        self.hooks, self.hooks_out, self.base_model = tuple(hooks), tuple(hooks_out), base_model

    @property
    def d_out(self) -> tuple[int, ...]:
        """Width of every layer's output."""
        return (self.b_dec.shape[1],) * len(self.layers)

    def layer(self, number: int) -> SAE:
        """The transcoder of one layer: its decoder holds all outputs of that layer side by side."""
        return self.layers[number]  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Shown by print(clt)."""
        first = self.layer(0)
        skip = ", with skip matrices" if self.W_skip is not None else ""
        return f"{len(self.layers)} layers, d_in={first.d_in}, d_sae={first.d_sae} each, d_out={self.d_out[0]}{skip}"

    def encode_sparse(self, x: Sequence[Tensor]) -> list[SparseCodes]:
        """Codes of every layer, from its input [..., d_in]."""
        if len(x) != len(self.layers):
            raise ConfigError(f"{len(x)} inputs for {len(self.layers)} layers")
        return [self.layer(n).encode_sparse(part) for n, part in enumerate(x)]

    def decode(self, codes: Sequence[SparseCodes], x: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The output of every layer [..., d_out], as far as the codes go; `x`, the inputs, where there is a skip."""
        if self.W_skip is not None and x is None:
            raise ConfigError("this transcoder adds a function of its inputs", hint="decode(codes, x), or call it")
        width, count = self.d_out[0], len(codes)
        sums = [self.b_dec[m].expand(*codes[0].values.shape[:-1], width) for m in range(count)]
        for n, one in enumerate(codes):
            written = self.layer(n).decode(one)  # [..., outputs * d_out]
            for m in range(n, count):
                sums[m] = sums[m] + written[..., (m - n) * width : (m - n + 1) * width]
        if self.W_skip is not None and x is not None:
            sums = [y + part.to(y) @ skip.t() for y, part, skip in zip(sums, x, self.W_skip, strict=False)]
        return sums

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """What the outputs of all layers are predicted to be."""
        return self.decode(self.encode_sparse(x), x)

    def _places(self) -> Iterator[tuple[int, HookPoint, HookPoint]]:
        if len(self.hooks) != len(self.layers) or len(self.hooks_out) != len(self.layers):
            raise HookError(
                "this cross-layer transcoder's record names no hook points",
                hint="read it with hook='mlp_in', hook_out='mlp_out'",
            )
        yield from zip(range(len(self.layers)), self.hooks, self.hooks_out, strict=True)

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[dict[int, SparseCodes]]:
        """Record the codes of every layer on each forward (of the latest one, by layer); the model is not changed."""
        seen: dict[int, SparseCodes] = {}

        def see(hidden: Tensor, layer: int) -> None:
            with torch.no_grad():
                seen[layer] = self.layer(layer).encode_sparse(hidden.to(self.b_dec.device))

        with ExitStack() as stack:
            for n, hook, _ in self._places():
                stack.enter_context(read_hook(model, hook, partial(see, layer=n)))
            yield seen

    @contextmanager
    def splice(self, model: nn.Module) -> Iterator[None]:
        """Put every layer's prediction in the place of its output."""
        inputs: list[Tensor] = []
        written: list[Tensor] = []
        width = self.d_out[0]

        def see(hidden: Tensor, layer: int) -> None:
            del inputs[layer:], written[layer:]
            inputs.append(hidden.to(self.b_dec.device, self.b_dec.dtype))
            written.append(self.layer(layer)(inputs[-1]))

        def edit(hidden: Tensor, _: dict[str, Any], layer: int) -> Tensor:
            if len(written) != layer + 1:
                raise HookError(f"the output of layer {layer} came before its input")
            out = self.b_dec[layer] + sum(
                part[..., (layer - n) * width : (layer - n + 1) * width] for n, part in enumerate(written)
            )
            if self.W_skip is not None:
                out = out + inputs[layer] @ self.W_skip[layer].t()
            return out.to(hidden)

        with ExitStack() as stack:
            for n, hook, out in self._places():
                stack.enter_context(read_hook(model, hook, partial(see, layer=n)))
                stack.enter_context(edit_hook(model, out, partial(edit, layer=n)))
            yield
