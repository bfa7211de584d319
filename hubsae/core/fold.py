"""The folding algebra: any affine input normaliser and any pre-bias become part of the canonical tensors.

In the training space z = (x - mean) / std an SAE has a pre-bias p, an encoder, and a decoder whose whole
bias is b_d. Substituting z gives the same function of the raw activation x with

    W_enc' = diag(1/std) W_enc      W_dec' = W_dec diag(std)      b_dec' = std * b_d + mean
    subtracting b_dec' first:       b_enc' = b_enc + (b_d - p) W_enc
    not subtracting it:             b_enc' = b_enc - (p + mean/std) W_enc

k and thresholds do not change. Done in float64 and stored as float32; subtracting b_dec first keeps large means out of
the product and is about ten times more exact when a dimension has one, so it is the default. A transcoder has the
statistics of its output in the place of the decoder's; its skip matrix becomes std_out * W_skip / std, and what the
mean adds through it goes into b_dec.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TrainedTensors(NamedTuple):
    """An SAE as it was trained: encoder [d_in, d_sae], decoder [d_sae, d_in], in the space of its inputs."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    """The whole of what decoding adds, a pre-bias that is added back included."""
    pre_bias: Tensor | None
    """What is subtracted before encoding; None where nothing is."""
    encoder_biases: dict[str, Tensor]
    """`b_enc`, or for gated SAEs `b_gate` and `b_mag`; all [d_sae]."""
    r_mag: Tensor | None = None
    """Gated only: log scale of the magnitudes [d_sae]."""
    W_skip: Tensor | None = None
    """Transcoders with a skip matrix: [d_out, d_in]."""


def fold(
    trained: TrainedTensors,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    apply_b_dec_to_input: bool | None = None,
    output: tuple[Tensor, Tensor] | None = None,
    transcoder: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """Canonical tensors on raw activations, and whether b_dec is subtracted before encoding.

    Left to itself it subtracts b_dec, except where the SAE subtracts nothing and has no normaliser: then the
    tensors are already canonical. What needs no arithmetic is passed through bit for bit. `output` is the mean and
    std of what a transcoder predicts.

    >>> eye = torch.eye(2)
    >>> t = TrainedTensors(eye, eye, torch.zeros(2), None, {"b_enc": torch.zeros(2)})
    >>> tensors, subtract = fold(t, mean=torch.tensor([3.0, 0.0]), std=torch.tensor([2.0, 1.0]))
    >>> tensors["b_dec"], tensors["W_dec"][0], subtract
    (tensor([3., 0.]), tensor([2., 0.]), True)
    """
    normalised = mean is not None or std is not None
    if apply_b_dec_to_input is None:
        apply_b_dec_to_input = not transcoder and (normalised or trained.pre_bias is not None)
    dtype = trained.W_enc.dtype
    b_d = trained.b_dec.double()
    zero = torch.zeros(trained.W_enc.shape[0], dtype=torch.float64, device=b_d.device)
    p = zero if trained.pre_bias is None else trained.pre_bias.double()
    mu = zero if mean is None else mean.double().expand_as(zero)
    sigma = zero + 1 if std is None else std.double().expand_as(zero)
    # the space of the output: that of the input, except where a transcoder has statistics of its own (or none)
    mu_out, sigma_out = (mu, sigma) if not transcoder else (torch.zeros_like(b_d), torch.ones_like(b_d))
    if output is not None:
        mu_out, sigma_out = output[0].double().expand_as(b_d), output[1].double().expand_as(b_d)
    scaled = output is not None if transcoder else normalised

    moved = (b_d - p) if apply_b_dec_to_input else -(p + mu / sigma)
    # one float64 copy of a matrix at a time: wide SAEs are packaged on small machines
    shift = moved @ trained.W_enc.double() if bool(moved.any()) else None
    out: dict[str, Tensor] = {
        "W_enc": (trained.W_enc.double() / sigma[:, None]).to(dtype) if normalised else trained.W_enc,
        "W_dec": (trained.W_dec.double() * sigma_out).to(dtype) if scaled else trained.W_dec,
        "b_dec": trained.b_dec,
    }
    if (skip := trained.W_skip) is not None:
        out["W_skip"] = skip
        if normalised or scaled:
            out["W_skip"] = (sigma_out[:, None] * skip.double() / sigma).to(dtype)
            b_d = b_d - skip.double() @ (mu / sigma)
    if scaled or (skip is not None and normalised):
        out["b_dec"] = (sigma_out * b_d + mu_out).to(dtype)
    for name, bias in trained.encoder_biases.items():
        if shift is None:
            out[name] = bias
            continue
        step = shift
        if name == "b_mag" and trained.r_mag is not None:
            step = shift * trained.r_mag.double().exp()
        out[name] = (bias.double() + step).to(dtype)
    if trained.r_mag is not None:
        out["r_mag"] = trained.r_mag
    return {name: tensor.contiguous() for name, tensor in out.items()}, apply_b_dec_to_input


def unfold(
    tensors: dict[str, Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    apply_b_dec_to_input: bool,
    output: tuple[Tensor, Tensor] | None = None,
) -> TrainedTensors:
    """The inverse of `fold`, in float64: the same SAE on inputs z = (x - mean) / std, for warm starts.

    With b_dec subtracted before encoding the result has p = b_dec (tied); otherwise it has no pre-bias. `output` is
    the mean and std of what a transcoder predicts.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    mu, sigma = mean.double(), std.double()
    mu_out, sigma_out = (mu, sigma) if output is None else (output[0].double(), output[1].double())
    W_enc = wide["W_enc"] * sigma[:, None]
    skip = wide.get("W_skip")
    b_d = (wide["b_dec"] - mu_out + (0 if skip is None else skip @ mu)) / sigma_out
    r_mag = wide.get("r_mag")
    biases = {name: wide[name] for name in ("b_enc", "b_gate", "b_mag") if name in wide}
    if not apply_b_dec_to_input:
        # x @ W' = z @ (std W') + mean @ W'
        shift = mu @ wide["W_enc"]
        for name in biases:
            scaled = name == "b_mag" and r_mag is not None
            biases[name] = biases[name] + (shift * r_mag.exp() if scaled and r_mag is not None else shift)
    return TrainedTensors(
        W_enc=W_enc,
        W_dec=wide["W_dec"] / sigma_out,
        b_dec=b_d,
        pre_bias=b_d if apply_b_dec_to_input else None,
        encoder_biases=biases,
        r_mag=r_mag,
        W_skip=None if skip is None else skip * sigma / sigma_out[:, None],
    )


def fold_decoder_norms(trained: TrainedTensors) -> TrainedTensors:
    """Remove a "pre-activations are multiplied by the decoder norm" rule by moving the norms into the encoder.

    Afterwards decoder rows have norm one and latents are in units of reconstruction. To be done before any
    normaliser is folded.
    """
    norms = trained.W_dec.double().norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    dtype = trained.W_enc.dtype
    return trained._replace(
        W_enc=(trained.W_enc.double() * norms).to(dtype),
        W_dec=(trained.W_dec.double() / norms[:, None]).to(dtype),
        encoder_biases={n: (b.double() * norms).to(dtype) for n, b in trained.encoder_biases.items()},
    )
