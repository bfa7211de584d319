"""The Qwen3-8B release, better than it was published: every checkpoint measured, every export, steering with numbers.

subject      the model and its conversations, fixed
activations  one layer on these conversations; some are put aside whole
train        a TopK SAE with AuxK on the normalised activations; stopped at any moment, it goes on or is rescued
checkpoints  the best three by loss and the last, each a complete release in every export format, read back
measure      all of them on what training never saw: error in raw and in normalised space, loss with them in place
index        what every feature of the published one fires on and promotes; its names, where a judge is given
steering     how often a feature's word is said when it is turned up, against random features and directions
dead         how many features die: variants over several seeds, beside the norm ratio of the activations
release      the published checkpoint with its record, numbers, index and pages, ready for `hubsae push RUN/release`
report       what was published beside what was measured

`--from-checkpoint best|last|STEP` leaves out `train` and `dead` and publishes what a halted run kept.
"""

from __future__ import annotations

import shutil
from typing import Any

from hubsae.activations.stream import open_stream
from hubsae.core.errors import ConfigError, DataError
from hubsae.core.files import read_csv, read_json, write_csv_atomic
from hubsae.core.normalizer import Normalizer
from hubsae.core.scopes import excluding, parse
from hubsae.evals import reconstruction, splice_many
from hubsae.evals.passes import run_pass
from hubsae.evals.reconstruction import prepare
from hubsae.formats import Release
from hubsae.index import explain
from hubsae.index.chat import LocalChat, ServerChat
from hubsae.index.features import FeatureIndex
from hubsae.recipes.one_layer import OneLayer, items, message_key
from hubsae.recipes.report import Report
from hubsae.recipes.standard import (
    Measures,
    add_pages,
    index_features,
    package,
    pick_device,
    publishing,
    tables_in,
    write_card,
)
from hubsae.recipes.steps import Step, StepContext, priced
from hubsae.recipes.subject import Subject, subject_of
from hubsae.recipes.sweep import train_cells, trained
from hubsae.train import train
from hubsae.train.kept import choose, kept_checkpoints
from hubsae.train.live import LiveActivations

from . import dead, exports, report, steer, tables
from .estimate import estimates
from .normalised import NormalisedError
from .settings import Config


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    c, run = config, _Release(config)
    data, sae = {"seed": c.seed, "model": c.model, "data": c.data}, {"seed": c.seed, "sae": c.sae, "live": c.live}
    kept = {"exports": c.exports, "sae": sae, "from": c.from_checkpoint or "last", "name": c.name,
            "probe_rows": c.measure.probe_rows}  # fmt: skip
    rescued = c.from_checkpoint is not None
    training, variants = () if rescued else ("train",), () if rescued else ("dead",)
    read = ("subject", "activations", "checkpoints")
    plan = [
        Step("subject", run.subject, data),
        Step("activations", run.activations, data, ("subject",), resumes=True),
        Step("train", run.train, sae, ("subject", "activations"), resumes=True),
        Step("checkpoints", run.checkpoints, kept, ("subject", "activations", *training), resumes=True,
             rescues=("train",) if rescued else ()),
        Step("measure", run.measure, c.measure, read, version=2),
        Step("index", run.index, {"index": c.index, "judge": c.judge}, read, resumes=True),
        Step("steering", run.steering, {"seed": c.seed, "steering": c.steering}, ("subject", "checkpoints", "index")),
        Step("dead", run.dead, {"sae": c.sae, "dead": c.dead}, ("activations",), resumes=True),
        Step("release", run.package, {"name": c.name},
             ("subject", "checkpoints", "measure", "index", "steering", *variants)),
        Step("report", run.report, {"name": c.name}, (*read, "measure", "index", "steering", *variants)),
        *publishing(c.publish, "activations"),
    ]  # fmt: skip
    return priced([step for step in plan if not rescued or step.name not in ("train", "dead")], estimates(config))


class _Release(OneLayer):
    """The steps' code; holds the config and nothing else."""

    config: Config

    def activations(self, ctx: StepContext) -> dict[str, Any]:
        """Write the activations of the layer on conversations, and on nothing else."""
        if message_key(subject_of(ctx).train) is None:
            raise DataError(
                "the rows hold no conversations", hint="name a dataset of chats, or data.kind=chats of a world"
            )
        return super().activations(ctx)

    def load_model(self, subject: Subject) -> Any:
        """The model; one that runs with another attention than the settings say is refused."""
        model, wanted = super().load_model(subject), self.config.data.attention
        found = getattr(model.config, "_attn_implementation", None)
        if found != wanted:
            raise ConfigError(f"the model runs with {found} attention, data.attention says {wanted}")
        return model

    def train(self, ctx: StepContext) -> dict[str, Any]:
        """Train, in the space of the harvest's statistics; a state and the best checkpoints lie in the folder."""
        stats, config, space = self.rows(ctx.path("activations")).stats, self.config.training(), None
        if config.normalize == "mean_std":
            found = stats.normalizer(without_first="position_0" in config.exclude)
            space = Normalizer(found.mean.float(), found.std.float(), found.count)
        result = train(config, self._source(ctx), out=ctx.folder, space=space, device=pick_device(), quiet=True)
        return {"steps": result.steps, "tokens": result.tokens}

    def _source(self, ctx: StepContext) -> Any:
        """What is trained on: the harvest, or the model itself on conversations behind those of the harvest."""
        rows, live, data = self.rows(ctx.path("activations")), self.config.live, self.config.data
        if not live.on:
            rows.window_bytes, rows.prefetch = self.config.sae.window_bytes, self.config.sae.prefetch
            return rows
        held = self.rows(ctx.path("activations"), "validation")
        first = 1 + max(int(part.columns("sample_id")["sample_id"].max()) for part in (rows, held))
        subject, about = subject_of(ctx), {"mode": "prompt+response", "max_length": data.max_length}
        model = self.load_model(subject)
        stream = open_stream(model, [self.hook], tokenizer=subject.tokenizer(), **about)
        about |= {"model": subject.label, "dataset": subject.dataset}
        return LiveActivations(
            stream, lambda: items(subject.train)[first:], tokens=self.config.sae.tokens, val_rows=0,
            buffer_rows=live.buffer_rows, seed=self.config.seed, info=about,
        )[self.hook]  # fmt: skip

    def checkpoints(self, ctx: StepContext) -> dict[str, Any]:
        """Each kept checkpoint as a release with all exports, every one of them read back and compared."""
        about, c = ctx.result("activations"), self.config
        kept = kept_checkpoints(c.training(), self._source(ctx), ctx.run_folder / "train")
        chosen, x, subject = choose(kept, c.from_checkpoint or "last"), self._probe(ctx), subject_of(ctx)
        for number, one in enumerate(kept):
            folder = ctx.folder / _name(one.step)
            ctx.progress(number, len(kept), folder.name)
            if (folder / exports.INVENTORY).is_file():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            made = package(
                folder, {self.id: one.load}, name=c.name, base_model=about["model"], also=c.exports,
                description=f"Checkpoint of {one.why}.", subject=subject,
            )  # fmt: skip
            made.add_results("exports", exports.compare(folder / self.id, c.exports, x))
            exports.write_inventory(made, exports.lineage(ctx, self.hook, c.training(), one))
        listed = [one._asdict() | {"load": None, "why": one.why} for one in kept]
        return {"kept": listed, "published": chosen.step, "why": chosen.why}

    def _probe(self, ctx: StepContext) -> Any:
        """Held-out activations of the kind the SAE is for."""
        held = self.rows(ctx.path("activations"), "validation")
        scope = excluding([name for name in self.config.sae.exclude if name != "massive"])
        x, labels = held.rows(0, self.config.measure.probe_rows, columns=scope.columns)
        return x.float()[scope.mask(labels, len(x))]

    def measure(self, ctx: StepContext) -> dict[str, Any]:
        """All kept checkpoints in one pass over what training never saw, and inside the model."""
        how, subject, results = self.config.measure, subject_of(ctx), ctx.result("checkpoints")
        saes = {_name(one["step"]): self._load(ctx, one["step"]) for one in results["kept"]}
        first, held = next(iter(saes.values())), self.rows(ctx.path("activations"), "validation")
        scope = parse(first.metadata.own_scope, first.metadata.training.massive_above)
        table, named, sums = prepare(saes, held)
        space = first.normalizer or held.stats.normalizer()
        found, normalised = run_pass(table, named, [sums, NormalisedError(named, space, scope)])
        model = self.load_model(subject)
        inside = splice_many(
            model, subject.tokenizer(), saes, items(subject.test)[: how.texts], max_length=how.text_length
        )
        rows = tables.all_rows([*found.rows(), *normalised], inside, scope.name)
        mine = [row for row in rows if row["sae"] == _name(results["published"]) and row["value"] is not None]
        shown = {"all_metrics": rows, "evaluation": tables.evaluation(rows, scope.name)}
        Measures({self.id: [tables.as_metric(row) for row in mine]}, tables=shown).write(ctx.folder)
        return {"scope": scope.name, **{r["metric"]: r["value"] for r in mine if r["scope"] == scope.name}}

    def index(self, ctx: StepContext) -> dict[str, Any]:
        """What every feature fires on and promotes, on all training activations; its name, where a judge is given."""
        c, subject, step = self.config, subject_of(ctx), ctx.result("checkpoints")["published"]
        (folder,) = index_features(
            ctx.folder, {self.id: self._load(ctx, step)}, self.rows(ctx.path("activations")), subject,
            top=c.index.top, window=c.index.window,
        )  # fmt: skip
        if c.judge is not None:
            chat = ServerChat(c.judge.server, c.judge.model) if c.judge.server else LocalChat(c.judge.model)
            explain.explain(folder, chat, c.judge.model, explain.plan(folder, count=c.judge.features), show=False)
        index = FeatureIndex.open(folder)
        counted = {name: index.summary[name] for name in ("n_tokens", "n_active", "n_dead")}
        return {"folder": folder.name, "features": len(index), **counted, "prompt_rows": tables.prompt_rows(folder)}

    def steering(self, ctx: StepContext) -> dict[str, Any]:
        """Turn features up, and random ones, and random directions; who says the feature's word?"""
        subject, sae = subject_of(ctx), self._load(ctx, ctx.result("checkpoints")["published"])
        index = FeatureIndex.open(ctx.path("index") / ctx.result("index")["folder"])
        found, prompts = steer.steered(
            self.load_model(subject), subject.tokenizer(), sae, index, items(subject.test), self.config.steering,
            self.config.seed,
        )  # fmt: skip
        for name, rows in found.items():
            write_csv_atomic(ctx.folder / f"{name}.csv", rows)
        return {"prompts": prompts, "verdicts": {row["feature"]: row["verdict"] for row in found["steering"]}}

    def dead(self, ctx: StepContext) -> dict[str, Any]:
        """Variants of the training on the same activations, over several seeds: how many features never fire."""
        folder, cells = ctx.path("activations"), self.config.variants()
        rows, held = self.rows(folder), self.rows(folder, "validation")
        outcomes = train_cells(list(cells.values()), rows, ctx.folder / "training", progress=ctx.progress)
        saes = {name: load() for name, load in trained(ctx.folder / "training", list(cells)).items()}
        measured = reconstruction(saes, held)
        found = [dead.row_of(one, measured[one.id], saes[one.id].metadata.own_scope) for one in outcomes if one.ok]
        write_csv_atomic(ctx.folder / "dead_cells.csv", found)
        write_csv_atomic(ctx.folder / "dead_features.csv", dead.summary(found, rows.stats, self.config))
        shutil.rmtree(ctx.folder / "training")
        return {"gamma": dead.gamma(rows.stats), "failed": [one.id for one in outcomes if not one.ok]}

    def package(self, ctx: StepContext) -> dict[str, Any]:
        """The published checkpoint's release with its numbers, the index, the pages, the card over all of it."""
        about, measured = ctx.result("checkpoints"), ctx.path("measure")
        shutil.copytree(ctx.path("checkpoints") / _name(about["published"]), ctx.folder, dirs_exist_ok=True)
        release, lineage = Release.open(ctx.folder), read_json(ctx.folder / exports.INVENTORY)["lineage"]
        record = release.metadata(self.id)
        record.set_metrics(Measures.read(measured).metrics[self.id])
        release.record(self.id, record)
        verdicts = read_csv(ctx.path("steering") / "steering.csv")
        limits = report.steering_in_words(ctx.result("steering")["prompts"], verdicts)
        release.manifest = release.manifest.model_copy(update={"limitations": limits})
        found = [measured, ctx.path("steering"), *([ctx.path("dead")] if "dead" in ctx.step.needs else [])]
        for name, rows in tables_in(*found).items():
            release.add_results(name, rows)
        release = add_pages(ctx.folder, ctx.path("index"), self.config.name)
        exports.write_inventory(release, lineage)
        write_card(ctx.folder, self.config.name)
        return {"ids": release.ids, "why": about["why"]}

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """What was published beside what was measured, and what the release is worth."""
        made = Report(f"{self.config.name}: {ctx.result('checkpoints')['why']}")
        report.write(made, ctx, self.config)
        return {"report": made.write(ctx.folder).name}

    def _load(self, ctx: StepContext, step: int) -> Any:
        return Release.open(ctx.path("checkpoints") / _name(step)).load(self.id)


def _name(step: int) -> str:
    return f"step-{step:06d}"
