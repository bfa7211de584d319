"""What an SAE is, as data: one formula, and the rule by which latents are selected.

    c   = b_dec if apply_b_dec_to_input else 0
    pre = (x - c) @ W_enc + b_enc
    z   = select(pre)
    x̂   = z @ W_dec + b_dec

Architectures differ in `select` and in nothing else, so they are a field and not a class hierarchy. A transcoder is the
same formula between two hook points: its decoder is d_out wide, c is 0, and a skip matrix may add `x @ W_skip.T`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hubsae.core.errors import ConfigError

Architecture = Literal["relu", "topk", "batch_topk", "jumprelu", "gated"]
TokenNorm = Literal["none", "layer_norm", "unit_norm", "constant_norm"]
DType = Literal["float32", "float64", "float16", "bfloat16"]

ARCHITECTURES: tuple[str, ...] = get_args(Architecture)


class SAEConfig(BaseModel):
    """Shape, selection rule and input handling of one SAE.

    >>> SAEConfig(architecture="topk", d_in=896, d_sae=7168, k=64).selection
    'topk(k=64), then ReLU'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture = Field(description="The selection rule.")
    d_in: int = Field(ge=1, description="Width of the activations.")
    d_sae: int = Field(ge=1, description="Number of latents.")
    k: int | None = Field(default=None, ge=1, description="Latents kept per token (topk, batch_topk).")
    topk_relu: bool = Field(
        default=True,
        description="topk: whether a ReLU follows the selection. False is the signed top-k of some releases.",
    )
    threshold: float | None = Field(
        default=None,
        description="batch_topk: a latent fires where its pre-activation is above this. "
        "None selects the k·tokens largest of each batch, so codes depend on the batch.",
    )
    apply_b_dec_to_input: bool = Field(default=True, description="Whether b_dec is subtracted before encoding.")
    token_norm: TokenNorm = Field(
        default="none",
        description="A norm applied to every token before encoding and undone after decoding. "
        "Not affine in x, hence never folded into the weights.",
    )
    dtype: DType = Field(default="float32", description="Type of the stored weights.")
    d_out: int | None = Field(
        default=None, ge=1, description="Transcoders: width of what is predicted. None for an autoencoder."
    )
    skip: bool | None = Field(default=None, description="Transcoders: true where W_skip maps the input to the output.")

    @model_validator(mode="before")
    @classmethod
    def _of_a_transcoder(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("d_out") is not None:
            return {"apply_b_dec_to_input": False, **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> SAEConfig:
        if self.architecture in ("topk", "batch_topk"):
            if self.k is None:
                raise ValueError(f"{self.architecture} needs k, the number of latents kept per token")
            if self.k > self.d_sae:
                raise ValueError(f"k={self.k} is larger than d_sae={self.d_sae}")
        if self.threshold is not None and self.architecture != "batch_topk":
            raise ValueError(
                f"threshold is the stored inference threshold of batch_topk; {self.architecture} has none "
                "(jumprelu keeps its thresholds as a tensor)"
            )
        if not self.topk_relu and self.architecture != "topk":
            raise ValueError(f"topk_relu=False means signed top-k; it says nothing for {self.architecture}")
        if self.skip and self.d_out is None:
            raise ValueError("skip is of transcoders: give d_out")
        if self.d_out is not None and (self.apply_b_dec_to_input or self.token_norm != "none"):
            raise ValueError(
                "a transcoder's b_dec lies at its output, so nothing of it can be subtracted from the input "
                "(apply_b_dec_to_input), and a norm of the input is not undone at the output (token_norm)"
            )
        return self

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts the activations of another hook point."""
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """Width of what is decoded: d_out of a transcoder, else d_in."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors this architecture has, in the order they are stored."""
        skip = ("W_skip",) if self.skip else ()
        if self.architecture == "gated":
            return ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag", *skip)
        if self.architecture == "jumprelu":
            return ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", *skip)
        return ("W_enc", "b_enc", "W_dec", "b_dec", *skip)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape the tensor `name` must have."""
        if name == "W_enc":
            return (self.d_in, self.d_sae)
        if name == "W_dec":
            return (self.d_sae, self.width_out)
        if name == "W_skip":
            return (self.width_out, self.d_in)
        return (self.width_out,) if name == "b_dec" else (self.d_sae,)

    @property
    def selection(self) -> str:
        """The selection rule in words, as cards and plans show it."""
        if self.architecture == "topk":
            return f"topk(k={self.k})" + (", then ReLU" if self.topk_relu else ", signed (no ReLU)")
        if self.architecture == "batch_topk":
            if self.threshold is None:
                return f"batch_topk(k={self.k}), selected over the batch"
            return f"batch_topk(k={self.k}), stored threshold {self.threshold:.6g}"
        return self.architecture

    def check_feature_subset(self) -> None:
        """Raise if latents of a subset of features cannot be told without the others."""
        needs_all = self.architecture == "topk" or (self.architecture == "batch_topk" and self.threshold is None)
        if needs_all:
            raise ConfigError(
                f"{self.selection} ranks all latents of a token, so the codes of a few features are not defined "
                "without the others",
                hint="use sae.pre_activations(x) and sae.W_dec of the subset, or load the SAE without features=",
            )
