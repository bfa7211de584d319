"""openai/sparse_autoencoder checkpoints: `pre_bias`, `encoder.weight`, `latent_bias`, `decoder.weight`.

The pre-bias is subtracted before encoding and added back. Those with a TopK activation normalise every token
(mean and unbiased standard deviation), which cannot be folded and is kept as layer_norm.
"""

from __future__ import annotations

from torch import Tensor

from hubsae.core.errors import FormatError
from hubsae.core.fold import TrainedTensors
from hubsae.core.metadata import DecoderFlags
from hubsae.core.sae import SAE
from hubsae.formats.assembling import Found, assemble, expect_keys, linear_pair
from hubsae.formats.base import Format, Overrides, Probe
from hubsae.formats.tensors import PICKLES

KEYS = ("pre_bias", "encoder.weight", "latent_bias")
DECODERS = ("decoder.weight", "decoder.linear.weight")
BUFFERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def detect(probe: Probe) -> str | None:
    """A dict with pre_bias, latent_bias and encoder.weight."""
    value = probe.pickle()
    if isinstance(value, dict) and set(KEYS) <= set(value):
        return "a dict with pre_bias, encoder.weight and latent_bias"
    return None


def _read(probe: Probe, choices: Overrides) -> SAE:
    value = probe.state()
    tensors = {k: v for k, v in value.items() if isinstance(v, Tensor)}
    expect_keys(probe.path, tensors, KEYS, (*DECODERS, *BUFFERS))
    pre_bias, encoder = tensors["pre_bias"], tensors["encoder.weight"]
    # tied checkpoints keep the encoder's matrix under the decoder's name
    tied = "decoder.linear.weight" in tensors or "decoder.weight" not in tensors
    decoder = encoder.t() if tied else tensors["decoder.weight"]
    W_enc, W_dec = linear_pair(probe.path, encoder, decoder, pre_bias.shape[0])
    activation = value.get("activation", "ReLU")
    state = value.get("activation_state_dict") or {}
    if activation not in ("ReLU", "TopK"):
        raise FormatError(probe.path, "the activation ReLU or TopK", repr(activation))
    k = state.get("k")
    return assemble(
        Found(
            format="openai",
            path=probe.path,
            trained=TrainedTensors(W_enc, W_dec, pre_bias, pre_bias, {"b_enc": tensors["latent_bias"]}),
            architecture="topk" if activation == "TopK" else "relu",
            k=int(k) if k is not None else None,
            topk_relu=activation != "TopK" or state.get("postact_fn", "ReLU") == "ReLU",
            token_norm="layer_norm" if activation == "TopK" else "none",
            layer=probe.name.layer,
            flags=DecoderFlags(
                decode_adds_b_pre=True, encoder_orientation="[d_sae, d_in]", decoder_orientation="[d_in, d_sae]"
            ),
        ),
        choices,
    )


FORMAT = Format(
    name="openai",
    title="openai/sparse_autoencoder",
    detect=detect,
    read=_read,
    suffixes=PICKLES,
    layout="`.pt`: `pre_bias`, `encoder.weight`, `latent_bias`, `decoder.weight`, `activation`",
)
