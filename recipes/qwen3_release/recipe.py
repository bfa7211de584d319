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
from hubsae.core.files import read_csv, read_json, write_csv_atomic, write_json_atomic
from hubsae.core.metadata import Metric
from hubsae.core.normalizer import Normalizer
from hubsae.core.scopes import excluding, parse
from hubsae.evals import reconstruction, splice_many, steering
from hubsae.evals.passes import run_pass
from hubsae.evals.reconstruction import prepare
from hubsae.formats import Release
from hubsae.index import explain
from hubsae.index.build import Settings as IndexSettings
from hubsae.index.build import index_activations
from hubsae.index.chat import LocalChat, ServerChat
from hubsae.index.features import FeatureIndex
from hubsae.recipes.one_layer import OneLayer, items, message_key
from hubsae.recipes.report import Report
from hubsae.recipes.standard import add_pages, package, pick_device, publish, write_card
from hubsae.recipes.steps import Step, StepContext
from hubsae.recipes.subject import Subject, subject_of
from hubsae.recipes.sweep import cells_in, train_cells
from hubsae.train import train
from hubsae.train.kept import choose, kept_checkpoints
from hubsae.train.live import LiveActivations

from . import exports, report, tables
from .estimate import estimates
from .normalised import DEFINITIONS, NormalisedError
from .settings import Config


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    c, run, cost = config, _Release(config), estimates(config)
    data, sae = {"seed": c.seed, "model": c.model, "data": c.data}, {"seed": c.seed, "sae": c.sae, "live": c.live}
    kept = {"exports": c.exports, "sae": sae, "from": c.from_checkpoint or "last", "name": c.name}
    kept["probe_rows"] = c.measure.probe_rows
    rescued = c.from_checkpoint is not None
    trained, dead = () if rescued else ("train",), () if rescued else ("dead",)
    read = ("subject", "activations", "checkpoints")
    plan = [
        Step("subject", run.subject, data),
        Step("activations", run.activations, data, ("subject",), resumes=True),
        Step("train", run.train, sae, ("subject", "activations"), resumes=True),
        Step("checkpoints", run.checkpoints, kept, ("subject", "activations", *trained), resumes=True,
             rescues=("train",) if rescued else ()),
        Step("measure", run.measure, c.measure, read),
        Step("index", run.index, {"index": c.index, "judge": c.judge}, read, resumes=True),
        Step("steering", run.steering, {"seed": c.seed, "steering": c.steering}, ("subject", "checkpoints", "index")),
        Step("dead", run.dead, {"sae": c.sae, "dead": c.dead}, ("activations",), resumes=True),
        Step("release", run.package, {"name": c.name},
             ("subject", "checkpoints", "measure", "index", "steering", *dead)),
        Step("report", run.report, {"name": c.name}, (*read, "measure", "index", "steering", *dead)),
    ]  # fmt: skip
    if c.publish.release or c.publish.activations:
        plan.append(Step("publish", run.publish, c.publish, ("activations", "release")))
    plan = [step for step in plan if not rescued or step.name not in ("train", "dead")]
    return [Step(**{**vars(step), "estimate": cost.get(step.name, step.estimate)}) for step in plan]


class _Release(OneLayer):
    """The steps' code; holds the config and nothing else."""

    def __init__(self, config: Config):
        super().__init__(config.seed, config.model, config.data)
        self.config = config

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
        stats, config, space = self.rows(ctx.path("activations"), "train").stats, self.config.training(), None
        if config.normalize == "mean_std":
            found = stats.normalizer(without_first="position_0" in config.exclude)
            space = Normalizer(found.mean.float(), found.std.float(), found.count)
        result = train(config, self._source(ctx), out=ctx.folder, space=space, device=pick_device(), quiet=True)
        return {"steps": result.steps, "tokens": result.tokens}

    def _source(self, ctx: StepContext) -> Any:
        """What is trained on: the harvest, or the model itself on conversations behind those of the harvest."""
        rows, live, data = self.rows(ctx.path("activations"), "train"), self.config.live, self.config.data
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
            exports.write_inventory(made, self._lineage(ctx, one.step, one.why))
        listed = [one._asdict() | {"load": None, "why": one.why} for one in kept]
        return {"kept": listed, "published": chosen.step, "why": chosen.why}

    def _probe(self, ctx: StepContext) -> Any:
        """Held-out activations of the kind the SAE is for."""
        held = self.rows(ctx.path("activations"), "validation")
        scope = excluding([name for name in self.config.sae.exclude if name != "massive"])
        x, labels = held.rows(0, self.config.measure.probe_rows, columns=scope.columns)
        return x.float()[scope.mask(labels, len(x))]

    def _lineage(self, ctx: StepContext, step: int, why: str) -> dict[str, Any]:
        about, subject = ctx.result("activations"), ctx.result("subject")
        return {
            "base_model": {"id": about["model"], "revision": subject.get("revision")}, "hook_point": self.hook,
            "texts": {"id": about["dataset"], "revision": subject.get("data_revision")},
            "activations": about["tokens"], "checkpoint": {"step": step, "why": why},
            "training": self.config.training().model_dump(mode="json"),
        }  # fmt: skip

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
        rows = [*found.rows(), *normalised]
        for name, result in inside.items():
            rows += [{"sae": name, **row} for row in result.rows()]
            rows.append(tables.kl_score(name, result, scope.name))
        rows = [{**row, "definition": row.get("definition") or DEFINITIONS[str(row["metric"])]} for row in rows]
        write_csv_atomic(ctx.folder / "all_metrics.csv", rows)
        write_csv_atomic(ctx.folder / "evaluation.csv", tables.evaluation(rows, scope.name))
        mine = [row for row in rows if row["sae"] == _name(results["published"]) and row["value"] is not None]
        write_json_atomic(ctx.folder / "metrics.json", [tables.as_metric(row).model_dump(mode="json") for row in mine])
        return {"scope": scope.name, **{r["metric"]: r["value"] for r in mine if r["scope"] == scope.name}}

    def index(self, ctx: StepContext) -> dict[str, Any]:
        """What every feature fires on and promotes, on all training activations; its name, where a judge is given."""
        c, subject, step = self.config, subject_of(ctx), ctx.result("checkpoints")["published"]
        (folder,) = index_activations(
            {self.id: self._load(ctx, step)}, self.rows(ctx.path("activations"), "train"), ctx.folder,
            IndexSettings(top=c.index.top, window=c.index.window), tokenizer=subject.tokenizer(),
            tokenizer_id=subject.label, model=subject.load(), show=False,
        )  # fmt: skip
        if c.judge is not None:
            chat = ServerChat(c.judge.server, c.judge.model) if c.judge.server else LocalChat(c.judge.model)
            explain.explain(folder, chat, c.judge.model, explain.plan(folder, count=c.judge.features), show=False)
        index = FeatureIndex.open(folder)
        counted = {name: index.summary[name] for name in ("n_tokens", "n_active", "n_dead")}
        return {"folder": folder.name, "features": len(index), **counted, "prompt_rows": tables.prompt_rows(folder)}

    def steering(self, ctx: StepContext) -> dict[str, Any]:
        """Turn features up, and random ones, and random directions; who says the feature's word?"""
        c, subject = self.config.steering, subject_of(ctx)
        index = FeatureIndex.open(ctx.path("index") / ctx.result("index")["folder"])
        tokenizer, sae = subject.tokenizer(), self._load(ctx, ctx.result("checkpoints")["published"])
        words = tables.words_of(index, c.features, sae.W_dec.detach().norm(dim=1).tolist())
        peaks = index.metrics["max"].to_pylist()
        alive = [f for f, peak in enumerate(peaks) if peak > 0]
        chosen = steering.directions(
            sae, {f: steering.tokens_of(tokenizer, [word]) for f, word in words.items()}, controls=c.controls,
            maxima={f: peaks[f] for f in words}, pool=alive, seed=self.config.seed,
        )  # fmt: skip
        result = steering.dose_response(
            self.load_model(subject), tokenizer,
            tables.questions(items(subject.test), tokenizer, c.prompts, c.prompt_length), chosen, c.strengths,
            max_new_tokens=c.new_tokens, rows_at_once=c.rows_at_once, seed=self.config.seed,
        )  # fmt: skip
        named = {f"feature {f}": word for f, word in words.items()}
        verdicts = [{"feature": r.feature, "word": named[r.feature], **r._asdict()} for r in result.reliability()]
        write_csv_atomic(ctx.folder / "dose_response.csv", [row.flat() for row in result.rows()])
        write_csv_atomic(ctx.folder / "steering.csv", verdicts)
        write_csv_atomic(ctx.folder / "steered_texts.csv", tables.examples(result, named))
        return {"prompts": len(result.prompts), "verdicts": {v["feature"]: v["verdict"] for v in verdicts}}

    def dead(self, ctx: StepContext) -> dict[str, Any]:
        """Variants of the training on the same activations, over several seeds: how many features never fire."""
        folder, cells = ctx.path("activations"), self.config.variants()
        rows, held = self.rows(folder, "train"), self.rows(folder, "validation")
        outcomes = train_cells(list(cells.values()), rows, ctx.folder / "training", progress=ctx.progress)
        shelf = cells_in(ctx.folder / "training")
        saes = {one.id: shelf.get(one.id) for one in outcomes if one.ok}
        measured = reconstruction(saes, held)
        found = [tables.dead_row(one, measured[one.id], saes[one.id].metadata.own_scope) for one in outcomes if one.ok]
        write_csv_atomic(ctx.folder / "dead_cells.csv", found)
        write_csv_atomic(ctx.folder / "dead_features.csv", tables.dead_summary(found, rows.stats, self.config))
        shutil.rmtree(ctx.folder / "training")
        return {"gamma": tables.gamma(rows.stats), "failed": [one.id for one in outcomes if not one.ok]}

    def package(self, ctx: StepContext) -> dict[str, Any]:
        """The published checkpoint's release with its numbers, the index, the pages, the card over all of it."""
        about, measured = ctx.result("checkpoints"), ctx.path("measure")
        shutil.copytree(ctx.path("checkpoints") / _name(about["published"]), ctx.folder, dirs_exist_ok=True)
        release, lineage = Release.open(ctx.folder), read_json(ctx.folder / exports.INVENTORY)["lineage"]
        record = release.metadata(self.id)
        record.set_metrics([Metric.model_validate(m) for m in read_json(measured / "metrics.json")])
        release.record(self.id, record)
        verdicts = read_csv(ctx.path("steering") / "steering.csv")
        limits = report.steering_in_words(ctx.result("steering")["prompts"], verdicts)
        release.manifest = release.manifest.model_copy(update={"limitations": limits})
        found = [measured, ctx.path("steering"), *([ctx.path("dead")] if "dead" in ctx.step.needs else [])]
        for path in (path for folder in found for path in sorted(folder.glob("*.csv"))):
            release.add_results(path.stem, read_csv(path))
        release = add_pages(ctx.folder, ctx.path("index"), self.config.name)
        exports.write_inventory(release, lineage)
        release.verify()
        write_card(ctx.folder, self.config.name)
        return {"ids": release.ids, "why": about["why"]}

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """What was published beside what was measured, and what the release is worth."""
        made = Report(f"{self.config.name}: {ctx.result('checkpoints')['why']}")
        report.write(made, ctx, self.config)
        return {"report": made.write(ctx.folder).name}

    def publish(self, ctx: StepContext) -> dict[str, Any]:
        """Push the release, and the activations where a repo is named for them."""
        return publish(self.config.publish, ctx.path("release"), ctx.path("activations"))

    def _load(self, ctx: StepContext, step: int) -> Any:
        return Release.open(ctx.path("checkpoints") / _name(step)).load(self.id)


def _name(step: int) -> str:
    return f"step-{step:06d}"
