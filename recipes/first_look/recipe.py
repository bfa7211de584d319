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

from hubsae.core.files import read_csv
from hubsae.core.settings import Settings
from hubsae.evals import reconstruction
from hubsae.evals.groups import error_by_group
from hubsae.evals.splice import splice
from hubsae.index.features import FeatureIndex
from hubsae.index.files import mark
from hubsae.recipes.cost import sae_bytes
from hubsae.recipes.one_layer import LayerData, OneLayer, items
from hubsae.recipes.report import Report
from hubsae.recipes.standard import Measures, Shelf, add_pages, index_features, package, tables_in
from hubsae.recipes.steps import Estimate, Step, StepContext
from hubsae.recipes.subject import ModelSettings, subject_of
from hubsae.train import TrainConfig, train
from hubsae.train.config import DeadConfig


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
    data: LayerData
    sae: SAESettings = SAESettings()
    measure: MeasureSettings = MeasureSettings()
    top: int = Field(default=10, description="Strongest tokens, and conversations, kept of each feature.")
    name: str = "sae-first-look"


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    c, look = config, _Look(config)
    texts = {"seed": c.seed, "model": c.model, "data": c.data}
    tokens, d = c.data.max_tokens, c.model.d_model
    weights = sae_bytes(d, d * c.sae.expansion)
    seen = int(tokens * c.sae.epochs)
    return [
        Step("subject", look.subject, texts, estimate=Estimate(c.model.label, disk=4 * c.model.parameters)),
        Step("activations", look.activations, texts, ("subject",), resumes=True,
             estimate=Estimate(f"layer {c.data.layer}, {tokens:,} tokens", disk=2 * d * tokens)),
        Step("sae", look.train, {"seed": c.seed, "sae": c.sae}, ("activations",), resumes=True,
             estimate=Estimate(f"{d * c.sae.expansion:,} latents on {seen:,} tokens", weights, 3 * weights)),
        Step("measure", look.measure, c.measure, ("subject", "activations", "sae"), version=2),
        Step("index", look.index, {"top": c.top}, ("subject", "activations", "sae"), resumes=True),
        Step("release", look.package, {"name": c.name}, ("subject", "activations", "sae", "measure", "index")),
        Step("report", look.report, {"name": c.name}, ("activations", "sae", "measure", "index")),
    ]  # fmt: skip


class _Look(OneLayer):
    """The steps' code; holds the config and nothing else."""

    config: Config

    def train(self, ctx: StepContext) -> dict[str, Any]:
        """Train the SAE; where its data come from it reads off them."""
        s, folder = self.config.sae, ctx.path("activations")
        rows, held = self.rows(folder), self.rows(folder, "validation")
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
        how, subject, sae = self.config.measure, subject_of(ctx), Shelf(ctx.path("sae")).get(self.id)
        held = self.rows(ctx.path("activations"), "validation")
        rebuilt = reconstruction({self.id: sae}, held)
        model, tokenizer = subject.load(), subject.tokenizer()
        groups = error_by_group({self.id: sae}, held, tokenizer=tokenizer)
        texts = items(subject.test)[: how.texts]
        inside = splice(model, tokenizer, sae, None, texts, name=self.id, max_length=how.text_length)
        metrics = [*rebuilt[self.id].metrics(), *inside.metrics()]
        tables = {"metrics": [*rebuilt.rows(), *inside.rows()], "error_by_group": groups}
        Measures({self.id: metrics}, tables=tables).write(ctx.folder)
        own = {m.name: m.value for m in metrics if m.scope == sae.metadata.own_scope}
        return {"scope": sae.metadata.own_scope, **own}

    def index(self, ctx: StepContext) -> dict[str, Any]:
        """Find what every feature fires on, and what it promotes."""
        subject, sae = subject_of(ctx), Shelf(ctx.path("sae")).get(self.id)
        rows = self.rows(ctx.path("activations"))
        (folder,) = index_features(ctx.folder, {self.id: sae}, rows, subject, top=self.config.top)
        index = FeatureIndex.open(folder)
        return {"folder": folder.name, "features": len(index), "alive": index.summary["n_active"]}

    def package(self, ctx: StepContext) -> dict[str, Any]:
        """The release: the SAE with its record and numbers, the index, the pages, the card over all of it."""
        about, shelf, measured = ctx.result("activations"), Shelf(ctx.path("sae")), ctx.path("measure")
        package(
            ctx.folder, {self.id: lambda: shelf.get(self.id)}, name=self.config.name, base_model=about["model"],
            measures=Measures.read(measured), tables=tables_in(measured), subject=subject_of(ctx),
        )  # fmt: skip
        return {"ids": add_pages(ctx.folder, ctx.path("index"), self.config.name).ids}

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


def features_to_read(index: FeatureIndex, count: int) -> list[dict[str, Any]]:
    """Some features with their contexts, spread over all that can be read."""
    readable = index.readable()
    chosen = [index[f] for f in readable[:: max(1, len(readable) // count)][:count]]
    return [
        {
            "feature": f.number,
            "density": f"{f.density:.2%}",
            "contexts": " | ".join(mark(e.tokens, e.center) for e in f.prompts[:3]),
            "promotes": " ".join(repr(token) for token, _ in f.logits["top"][:5]),
        }
        for f in chosen
    ]
