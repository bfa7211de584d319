"""One SAE on one layer of an instruct model, with its features in the open: index, pages, card.

subject      the model and its conversations, fixed
activations  one layer on these conversations; some are put aside whole
sae          one TopK SAE on them; tokens of massive norm are left out by name
measure      reconstruction on the conversations put aside, loss of the model with the SAE in place
index        what every feature fires on, in context, and what it promotes
release      the SAE with its record, numbers, index and pages, ready for `hubsae push RUN/release`
report       the numbers, the error by group of tokens, and some features to read
"""

from __future__ import annotations

import shutil
from typing import Any

from pydantic import Field

from hubsae.activations import ActivationDataset, harvest
from hubsae.core.files import read_csv, read_json, write_csv_atomic, write_json_atomic, write_text_atomic
from hubsae.core.hooks import HookPoint
from hubsae.core.metadata import Metric
from hubsae.core.settings import Settings
from hubsae.evals import reconstruction
from hubsae.evals.groups import error_by_group
from hubsae.evals.splice import splice
from hubsae.formats import Release
from hubsae.hub.card import card_of_release, render_card
from hubsae.index import page
from hubsae.index.build import Settings as IndexSettings
from hubsae.index.build import index_activations
from hubsae.index.features import FeatureIndex
from hubsae.index.files import FOLDER, mark
from hubsae.recipes.report import Report
from hubsae.recipes.standard import Activations, Shelf, package, pick_device
from hubsae.recipes.steps import Estimate, Step, StepContext
from hubsae.recipes.subject import DataSettings, ModelSettings, Subject, fetch_subject, open_subject
from hubsae.train import TrainConfig, train
from hubsae.train.config import DeadConfig


class LookData(DataSettings):
    """The conversations, and the place where activations are read."""

    layer: int = Field(ge=0, description="0-based block whose output is read.")
    max_tokens: int = Field(ge=1000, description="Activations harvested.")
    max_length: int = 512
    validation_fraction: float = Field(default=0.1, gt=0, lt=1, description="Share of conversations put aside.")


class SAESettings(Settings):
    """The SAE, and how it is trained."""

    expansion: int = 8
    k: int = 32
    epochs: float = 4
    batch_size: int = 512
    lr: float = 1e-3
    dead_tokens: int = 50_000
    exclude: tuple[str, ...] = ("position_0",)


class MeasureSettings(Settings):
    """How much is measured."""

    texts: int = Field(default=10, ge=2, description="Conversations on which the loss is measured.")
    text_length: int = 192


class Config(Settings):
    """Everything a run depends on."""

    seed: int = 0
    model: ModelSettings
    data: LookData
    sae: SAESettings = SAESettings()
    measure: MeasureSettings = MeasureSettings()
    top: int = Field(default=10, description="Strongest tokens, and conversations, kept of each feature.")
    name: str = "sae-first-look"


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    c, look = config, _Look(config)
    texts = {"seed": c.seed, "model": c.model, "data": c.data}
    tokens, d = c.data.max_tokens, c.model.d_model
    weights = 8 * d * d * c.sae.expansion
    seen = int(tokens * c.sae.epochs)
    return [
        Step("subject", look.subject, texts, estimate=Estimate(c.model.label, disk=4 * c.model.parameters)),
        Step("activations", look.activations, texts, ("subject",), resumes=True,
             estimate=Estimate(f"layer {c.data.layer}, {tokens:,} tokens", disk=2 * d * tokens)),
        Step("sae", look.train, {"seed": c.seed, "sae": c.sae}, ("activations",), resumes=True,
             estimate=Estimate(f"{d * c.sae.expansion:,} latents on {seen:,} tokens", weights, 3 * weights)),
        Step("measure", look.measure, c.measure, ("subject", "activations", "sae")),
        Step("index", look.index, {"top": c.top}, ("subject", "activations", "sae"), resumes=True),
        Step("release", look.package, {"name": c.name}, ("subject", "activations", "sae", "measure", "index")),
        Step("report", look.report, {"name": c.name}, ("activations", "sae", "measure", "index")),
    ]  # fmt: skip


class _Look:
    """The steps' code; holds the config and nothing else."""

    def __init__(self, config: Config):
        self.config = config
        self.hook = HookPoint.parse(config.data.layer).name
        self.id = f"layer{config.data.layer}"

    def subject(self, ctx: StepContext) -> dict[str, Any]:
        """Model and conversations: made, opened or downloaded, and fixed."""
        return fetch_subject(ctx.folder, self.config.model, self.config.data, self.config.seed, ctx.progress)

    def activations(self, ctx: StepContext) -> dict[str, Any]:
        """Write the activations of one layer; the tokens of a conversation keep their role, turn and group."""
        data, subject = self.config.data, _subject(ctx)
        harvest(
            subject.load(pick_device(), self.config.model.dtype), _items(subject.train), [self.hook], out=ctx.folder,
            tokenizer=subject.tokenizer(), mode=_mode(subject.train), max_length=data.max_length,
            max_tokens=data.max_tokens, validation_fraction=data.validation_fraction, split_by="sample",
            split_seed=self.config.seed, progress=False,
            source={"model": subject.label, "text_dataset": subject.dataset},
        )  # fmt: skip
        sizes = {split: len(self._rows(ctx.folder, split)) for split in ("train", "validation")}
        return {"model": subject.label, "dataset": subject.dataset, "tokens": sizes}

    def train(self, ctx: StepContext) -> dict[str, Any]:
        """Train the SAE; where its data come from it reads off them."""
        s, folder = self.config.sae, ctx.path("activations")
        rows, held = self._rows(folder, "train"), self._rows(folder, "validation")
        config = TrainConfig(
            name=self.id, architecture="topk", d_sae=rows.d * s.expansion, k=s.k, lr=s.lr, seed=self.config.seed,
            epochs=s.epochs, batch_size=s.batch_size, exclude=s.exclude, dead=DeadConfig(tokens=s.dead_tokens),
        )  # fmt: skip
        result = train(config, rows, out=ctx.folder / "training", val=held, quiet=True)
        Shelf(ctx.folder).put(self.id, result.sae)
        shutil.rmtree(ctx.folder / "training")
        return {"latents": config.d_sae, "tokens": result.tokens}

    def measure(self, ctx: StepContext) -> dict[str, Any]:
        """Measure on what training never saw: reconstruction, error by group of tokens, loss with the SAE in place."""
        how, subject, sae = self.config.measure, _subject(ctx), Shelf(ctx.path("sae")).get(self.id)
        held = self._rows(ctx.path("activations"), "validation")
        rebuilt = reconstruction({self.id: sae}, held)
        model, tokenizer = subject.load(), subject.tokenizer()
        groups = error_by_group({self.id: sae}, held, tokenizer=tokenizer)
        texts = _items(subject.test)[: how.texts]
        inside = splice(model, tokenizer, sae, None, texts, name=self.id, max_length=how.text_length)
        metrics = [*rebuilt[self.id].metrics(), *inside.metrics()]
        write_json_atomic(ctx.folder / "metrics.json", [m.model_dump(mode="json") for m in metrics])
        write_csv_atomic(ctx.folder / "metrics.csv", [*rebuilt.rows(), *inside.rows()])
        write_csv_atomic(ctx.folder / "error_by_group.csv", groups)
        own = {m.name: m.value for m in metrics if m.scope == sae.metadata.own_scope}
        return {"scope": sae.metadata.own_scope, **own}

    def index(self, ctx: StepContext) -> dict[str, Any]:
        """Find what every feature fires on, and what it promotes."""
        subject, sae = _subject(ctx), Shelf(ctx.path("sae")).get(self.id)
        (folder,) = index_activations(
            {self.id: sae}, self._rows(ctx.path("activations"), "train"), ctx.folder,
            IndexSettings(top=self.config.top),
            tokenizer=subject.tokenizer(), tokenizer_id=subject.label, model=subject.load(), show=False,
        )  # fmt: skip
        index = FeatureIndex.open(folder)
        return {"folder": folder.name, "features": len(index), "alive": index.summary["n_active"]}

    def package(self, ctx: StepContext) -> dict[str, Any]:
        """The release: the SAE with its record and numbers, the index, the pages, the card over all of it."""
        about, shelf, measured = ctx.result("activations"), Shelf(ctx.path("sae")), ctx.path("measure")
        metrics = [Metric.model_validate(m) for m in read_json(measured / "metrics.json")]
        made = package(
            ctx.folder, {self.id: lambda: shelf.get(self.id)}, name=self.config.name, base_model=about["model"],
            metrics={self.id: metrics}, subject=_subject(ctx),
            tables={name: read_csv(measured / f"{name}.csv") for name in ("metrics", "error_by_group")},
        )  # fmt: skip
        shutil.copytree(ctx.path("index"), ctx.folder / FOLDER, dirs_exist_ok=True)
        page.build(ctx.folder, title=self.config.name)
        Release.open(ctx.folder).refresh().verify()
        # the card shows features once there are some to show
        text = render_card(card_of_release(ctx.folder, f"you/{self.config.name}")).text
        write_text_atomic(ctx.folder / "README.md", text)
        return {"ids": made.ids}

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """Numbers with their scope, and features in context."""
        about, measured, found = ctx.result("activations"), ctx.result("measure"), ctx.result("index")
        report = Report(f"First look: {about['model']}, layer {self.config.data.layer}")
        report.text(
            f"One TopK SAE ({found['features']:,} latents, k {self.config.sae.k}) trained on "
            f"{about['tokens']['train']:,} tokens of {about['dataset']} ({self.config.sae.epochs:g} epochs), measured "
            f"on {about['tokens']['validation']:,} tokens of conversations it never saw. Scope of every number below: "
            f"{measured['scope']}, which is what it was trained on."
        )
        own = [{"metric": k, "value": v} for k, v in measured.items() if k != "scope"]
        report.table("In its own scope", "own_scope", own)
        report.table("Error by group of tokens", "error_by_group", read_csv(ctx.path("measure") / "error_by_group.csv"))
        report.heading("Features")
        report.text(f"{found['alive']:,} of {found['features']:,} fire on these tokens. The first examples of some:")
        index = FeatureIndex.open(ctx.path("index") / found["folder"])
        report.table("Some features", "features", features_to_read(index, 20))
        return {"report": report.write(ctx.folder).name}

    def _rows(self, folder: Any, split: str) -> ActivationDataset:
        return Activations(folder).open(self.hook, split)


def features_to_read(index: FeatureIndex, count: int, examples: int = 3) -> list[dict[str, Any]]:
    """Some features with their contexts, spread over all that can be read."""
    readable = index.readable()
    chosen = [index[f] for f in readable[:: max(1, len(readable) // count)][:count]]
    return [
        {
            "feature": f.number,
            "density": f"{f.density:.2%}",
            "contexts": " | ".join(mark(e.tokens, e.center) for e in f.prompts[:examples]),
            "promotes": " ".join(repr(token) for token, _ in f.logits["top"][:5]),
        }
        for f in chosen
    ]


def _subject(ctx: StepContext) -> Subject:
    return open_subject(ctx.path("subject"), ctx.result("subject"))


def _items(rows: list[dict[str, Any]]) -> list[Any]:
    return [row if "messages" in row else row.get("text", row.get("question")) for row in rows]


def _mode(rows: list[dict[str, Any]]) -> Any:
    return "prompt+response" if "messages" in rows[0] else "text"
