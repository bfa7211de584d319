"""Settings of the recipe. The defaults are what was published, as far as it was; profiles say what they change."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hubsae.core.settings import Settings
from hubsae.recipes.standard import PublishSettings
from hubsae.recipes.subject import ModelSettings

Method = Literal["fast", "bt-f", "bt-p"]
Kind = Literal["standard", "jumprelu", "topk"]
LABELS: dict[str, str] = {"fast": "FAST", "bt-f": "BT(F)", "bt-p": "BT(P)"}
"""Method -> its published name."""
IN_WORDS = {
    "st": "special tokens, as published",
    "st_no0": "special tokens, without position 0",
    "all": "all tokens, as published",
    "no0": "all tokens, without position 0",
}
"""Short names of the tokens that errors are of."""


class Source(Settings):
    """A dataset of chats or of plain texts on a Hub."""

    id: str
    config: str | None = None
    split: str = "train"


CHATS = (
    Source(id="allenai/WildChat-1M-Full"),
    Source(id="BAAI/Infinity-Instruct", config="0625"),
    Source(id="allenai/tulu-3-sft-mixture"),
    Source(id="mlabonne/orca-agentinstruct-1M-v1-cleaned", split="default"),
    Source(id="lmsys/lmsys-chat-1m"),
)
PILE = Source(id="monology/pile-uncopyrighted")


class Data(Settings):
    """The texts, how they are cut, and where activations are read. Of a world's model, the texts are the world's."""

    layer: int = Field(ge=0, description="0-based block whose output is read.")
    chats: tuple[Source, ...] = Field(default=CHATS, description="Read in turn, a chat from each.")
    texts: Source = PILE
    most_chats: int = Field(default=120_000, ge=2, description="Chats kept for training; begun again when they end.")
    most_texts: int = Field(default=200_000, ge=1)
    test_chats: int = Field(default=5_000, ge=2, description="Chats kept out of training, on which all is measured.")
    ngram: int = Field(default=20, ge=1, description="A chat that shares a run of this many words is left out.")
    dedup_megabytes: float = Field(default=1024, gt=0, description="Memory of the search for shared runs.")
    max_length: int = Field(default=8192, ge=8, description="FAST: where a chat is cut off.")
    block: int = Field(default=2048, ge=8, description="BT(F), BT(P): tokens of a block.")
    special: tuple[str, ...] = Field(
        default=("<|im_start|>", "<|im_end|>", "user", "assistant"),
        description="The tokens of MSE_st, wherever they stand; a name may be several tokens of a model.",
    )


class Train(Settings):
    """The SAEs of each method: every kind at every coefficient, expansion and seed, in one pass over one stream."""

    methods: tuple[Method, ...] = ("fast", "bt-f", "bt-p")
    kinds: tuple[Kind, ...] = ("standard", "jumprelu", "topk")
    standard: tuple[float, ...] = Field(default=(2.5, 5, 10), description="L1 coefficients; 5 was published.")
    jumprelu: tuple[float, ...] = Field(default=(0.005, 0.01, 0.02), description="L0 coefficients; 0.01 was published.")
    topk: tuple[int, ...] = Field(default=(32, 64, 128), description="k; no TopK SAE was published.")
    published: dict[str, float] = Field(
        default={"standard": 5, "jumprelu": 0.01},
        description="The coefficient at which methods are compared as published, at whatever L0 each comes out.",
    )
    expansions: tuple[float, ...] = (8,)
    seeds: tuple[int, ...] = (42, 43)
    tokens: int = Field(default=40_960_000, ge=1, description="Tokens every SAE is trained on.")
    batch_size: int = 128
    lr: float = 7e-5
    floor: float = Field(default=0.1, description="7e-6 at the end of the cosine.")
    warmup_steps: int = 16_000
    cooldown_steps: int = Field(default=64_000, description="The last steps: linear to 0, as SAELens decays.")
    sparsity_warmup_steps: int = 10_000
    bandwidth: float = 0.001
    threshold: float = Field(default=0.001, description="First threshold of every latent.")
    threshold_lr: float = Field(default=1.0, description="Learning rate of the thresholds, as a multiple of lr.")
    exclude: tuple[str, ...] = Field(
        default=(), description="Groups of tokens left out in training; none as published."
    )
    buffer_rows: int = Field(default=131_072, ge=8, description="Tokens mixed with each other; size not published.")
    init_rows: int = Field(default=8_192, description="Tokens of which b_dec starts as the geometric median.")
    dead_tokens: int = Field(default=128_000, description="A latent silent for this many counts as dead: 1,000 steps.")
    states: int = Field(default=20, ge=1, description="States left over a run, to go on from.")
    batch_tokens: int | None = Field(default=None, description="Tokens per pass of the model, padding included.")
    window: int = Field(
        default=1024, ge=1, description="Chats sorted by length together, longest first: few where the budget is small."
    )

    @model_validator(mode="after")
    def _some(self) -> Train:
        for kind in self.kinds:
            if not getattr(self, kind):
                raise ValueError(f"{kind} is among the kinds and has no coefficient")
        return self


class Measure(Settings):
    """What is measured, and on how much."""

    tokens: int = Field(default=2_000_000, ge=100, description="Tokens of test chats, harvested once.")
    levels: int = Field(default=3, ge=1, description="Levels of L0 at which methods are compared.")
    texts: int = Field(default=200, ge=2, description="Test chats on which the loss is measured.")
    text_length: int = 1024
    gsnr_batches: int = Field(default=128, ge=2)


class Judge(Settings):
    """Who judges features and answers: `rule` (no model: the strongest tokens alone), `none`, or a chat model."""

    model: str = Field(default="rule", description="rule, none, the name of a model on `server`, or a model's folder.")
    server: str | None = Field(default=None, description="OpenAI-compatible address; the key is in OPENAI_API_KEY.")


class Interpret(Settings):
    """Features that are read by a judge."""

    judge: Judge = Judge()
    kinds: tuple[Kind, ...] = ("jumprelu",)
    features: int = Field(default=128, ge=1, description="Drawn at random of each SAE.")
    shown: int = Field(default=5, ge=2, description="Contexts of each that the judge sees.")
    scored: int = Field(default=32, ge=0, description="Features with detection and fuzzing scores.")


class Steer(Settings):
    """Steering by the features that special tokens excite most."""

    kind: Kind = "jumprelu"
    method: Method = "fast"
    strengths: tuple[float, ...] = (15, 25, 50, 100, 150, 200)
    controls: int = Field(default=2, ge=1, description="Random features, and random directions, beside each feature.")
    questions: int = Field(default=10, ge=1)
    new_tokens: int = 128


class Config(Settings):
    """Everything a run depends on: one layer of one model.

    >>> Config(model={"id": "tiny"}, data={"layer": 2}).train.tokens
    40960000
    """

    seed: int = Field(default=0, description="Order of the data, and every choice at random but those of `seeds`.")
    model: ModelSettings
    data: Data
    train: Train = Train()
    measure: Measure = Measure()
    interpret: Interpret = Interpret()
    steer: Steer = Steer()
    name: str = "sae-fast"
    license: str | None = "apache-2.0"
    publish: PublishSettings = PublishSettings()
