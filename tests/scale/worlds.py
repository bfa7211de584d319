"""What tests of tasks share: tiny texts, activations and SAEs, and jobs of which one task is killed once."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubsae.activations.ranks import Ranks
from hubsae.scale import Harvest, Index

D, D_SAE, N = 32, 64, 20_000


def contents(folder: Path) -> dict[str, str]:
    """Every file that is no record of a run, by its hash."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    shown = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in shown}


def make_model(folder: Path) -> str:
    """A random Qwen2 model with a tokenizer, in a folder."""
    import transformers

    from hubsae.recipes.tiny_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["Ann has 12 apples and eats 3 of them"] * 8, vocab_size=290)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_texts(path: Path, count: int = 60) -> str:
    """Texts of different lengths, one a line."""
    path.write_text("".join(f"Ann has {n} apples and eats {'many ' * (n % 9)}of them\n" for n in range(count)))
    return str(path)


def make_release(folder: Path) -> str:
    """A release of two SAEs."""
    from hubsae.core.config import SAEConfig
    from hubsae.formats.release import Release
    from hubsae.hub.sae import HubSAE

    release = Release.create(folder, name="r", base_model="someone/tiny")
    for number, k in enumerate((2, 4)):
        sae = HubSAE.random(SAEConfig(architecture="topk", d_in=D, d_sae=D_SAE, k=k), seed=number)
        sae.metadata.hook.layer, sae.metadata.hook.module_path = 1, "model.layers.1"
        release.add(sae, f"k{k}/layer1")
    return str(folder)


def make_activations(folder: Path) -> str:
    """Rows of a hook point, in samples of 45 tokens."""
    from hubsae.activations import ActivationWriter

    rows = torch.arange(N)
    with ActivationWriter(folder, d=D, config="layers.1", columns={"is_special": "bool"}) as writer:
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
        writer.write(x, position=rows % 45, sample_id=rows // 45, token_id=rows % 50, is_special=rows % 45 == 0)
    return str(folder)


def small_parts() -> None:
    """Parts of one block, so that few rows are several of them; for this process."""
    from hubsae.evals import passes

    passes.PART_BLOCKS = 1


def die_once(flag: Path) -> None:
    """End this process as `kill -9` does, the first time."""
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another method for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass(frozen=True, kw_only=True)
class DyingHarvest(Harvest):
    """A harvest whose task 1 is killed when it has written something, the first time."""

    def task(self, ranks: Ranks) -> None:
        from hubsae.activations.stream import Stream

        forward = Stream._forward

        def dying(stream: Stream, batch: list[Any]) -> Any:
            if ranks.rank == 1 and stream.counts.tokens > 100:
                die_once(Path(self.out) / ".died")
            return forward(stream, batch)

        with replaced(Stream, "_forward", dying):
            super().task(ranks)


@dataclass(frozen=True, kw_only=True)
class DyingIndex(Index):
    """An index whose task 1 is killed when it has made its first part, the first time; parts are small."""

    def task(self, ranks: Ranks) -> None:
        from hubsae.index import build

        small_parts()
        keep = build._Work.keep

        def dying(work: Any, name: str, tables: Any) -> None:
            if ranks.rank == 1:
                die_once(self.home / ".died")
            keep(work, name, tables)

        with replaced(build._Work, "keep", dying):
            super().task(ranks)


HARVEST = {"window": 4, "batch_tokens": 200, "validation_fraction": 0.2}
INDEX = {"top": 3, "random": 3, "window": 2}


def harvest_job(world: dict[str, str], out: Path, kind: type[Harvest] = Harvest, **options: Any) -> Harvest:
    """Texts of the world through its model; 15 parts."""
    return kind(
        model=world["model"], dataset=world["texts"], layers=[0, 1], out=str(out), options={**HARVEST, **options}
    )


def index_job(world: dict[str, str], out: Path, kind: type[Index] = Index, **settings: Any) -> Index:
    """The SAEs of the world on its activations; 5 parts."""
    return kind(
        release=world["release"], activations=world["activations"], config="layers.1", out=str(out), force=True,
        settings={**INDEX, **settings},
    )  # fmt: skip
