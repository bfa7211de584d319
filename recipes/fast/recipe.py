"""FAST: SAEs for instruct models, trained on each chat alone or on packed blocks, and compared at equal sparsity.

    corpus     the model; chats that share no run of 20 words, some put aside; plain texts
    train/*    FAST, BT(F), BT(P): every SAE of a method from one pass of the model, mixed as published
    heldout    activations of the chats that were put aside, each alone in its template
    measure    errors by group of tokens, L0, gradients, loss with an SAE in place; methods at equal L0
    interpret  an index of some SAEs, their features rated by a judge, beside controls
    steer      the features of special tokens, in doses, beside random features and directions
    release    every SAE with method and data mode in its record, card, index and pages
    report     the one table, the published tables beside ours, and which claims either supports

What was published, and where its numbers say something else than its words, is in README.md; the numbers in
published.csv.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hubsae.activations import harvest
from hubsae.core.files import atomic_path, write_csv_atomic
from hubsae.evals.plots import house_style
from hubsae.recipes.one_layer import OneLayer
from hubsae.recipes.standard import Measures, add_pages, index_features, package, pick_device, publishing
from hubsae.recipes.steps import Step, StepContext, priced
from hubsae.recipes.subject import subject_of
from hubsae.recipes.sweep import train_cells, trained
from hubsae.train.live import LiveActivations

from . import corpus, interpret, matched, plots, report, steer
from .cells import cells, train_configs
from .estimates import estimates
from .measure import measure_all, places_of, special_ids
from .settings import Config


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    c, run = config, _Fast(config)
    about = {"seed": c.seed, "model": c.model, "layer": c.data.layer}
    texts = {**about, "data": c.data}
    held = {**about, "max_length": c.data.max_length, "tokens": c.measure.tokens}
    measured = {"measure": c.measure, "special": c.data.special, "published": c.train.published}
    training = [
        Step(f"train/{m}", partial(run.train, m), {**texts, "train": c.train}, ("corpus",), resumes=True)
        for m in c.train.methods
    ]
    made = ("corpus", *(step.name for step in training), "heldout")
    read = (*made, "measure")
    plan = [
        Step("corpus", run.corpus, texts),
        *training,
        Step("heldout", run.heldout, held, ("corpus",), resumes=True),
        Step("measure", run.measure, measured, made),
        Step("interpret", run.interpret, c.interpret, read, resumes=True),
        Step("steer", run.steer, {"steer": c.steer, "judge": c.interpret.judge}, read),
        Step("release", run.package, {"name": c.name, "license": c.license}, (*read, "interpret", "steer")),
        Step("report", run.report, needs=(*read, "interpret", "steer")),
        *publishing(c.publish),
    ]
    return priced(plan, estimates(config))


class _Fast(OneLayer):
    """The steps' code; holds the config and nothing else."""

    config: Config

    def corpus(self, ctx: StepContext) -> dict[str, Any]:
        """Model and texts: made, opened or downloaded, without repeats, and fixed."""
        return corpus.gather(ctx.folder, self.config, ctx.progress)

    def train(self, method: str, ctx: StepContext) -> dict[str, Any]:
        """Every SAE of a method, from one stream of activations."""
        c, subject = self.config, subject_of(ctx, "corpus")
        model = self.load_model(subject)
        stream, texts = corpus.streams(subject, ctx.path("corpus"), c, method, model, self.hook)
        about = ctx.result("corpus")
        dataset = about["text_dataset"] if method == "bt-p" else about["dataset"]
        live = LiveActivations(
            stream, texts, tokens=c.train.tokens, buffer_rows=c.train.buffer_rows, mixing="half", val_rows=0,
            seed=c.seed, info={"model": subject.label, "revision": subject.revision, "dataset": dataset},
        )  # fmt: skip
        rows = live[self.hook]
        with atomic_path(ctx.folder / "rows.safetensors") as scratch:
            position = torch.from_numpy(rows.reserve.labels["position"]).long()
            save_file({"x": rows.reserve.x.float().contiguous(), "position": position}, scratch)
        place = self.place(subject, model, c.data.max_length if method == "fast" else c.data.block)
        place["activations"] = {"text_dataset": dataset, "tokens": c.train.tokens}
        configs = train_configs(c, method, place)
        ended = train_cells(configs, rows, ctx.folder, progress=ctx.progress)
        return {"failed": {o.id: o.reason for o in ended if not o.ok}, "done": sum(o.ok for o in ended)}

    def heldout(self, ctx: StepContext) -> dict[str, Any]:
        """Activations of chats that no SAE saw."""
        c, subject = self.config, subject_of(ctx, "corpus")
        harvest(
            self.load_model(subject), subject.test, [self.hook], out=ctx.folder, tokenizer=subject.tokenizer(),
            mode="prompt+response", max_length=c.data.max_length, max_tokens=c.measure.tokens, progress=False,
            source={"model": subject.label, "text_dataset": subject.dataset},
        )  # fmt: skip
        return {"tokens": len(self.rows(ctx.folder))}

    def measure(self, ctx: StepContext) -> dict[str, Any]:
        """Errors by group of tokens, gradients, and the model's loss; then the methods at equal L0."""
        c, subject, saes = self.config, subject_of(ctx, "corpus"), self._saes(ctx)
        kept = {method: ctx.path(f"train/{method}") / "rows.safetensors" for method in c.train.methods}
        found, chosen = measure_all(
            c, saes, self.rows(ctx.path("heldout")), kept, self.load_model(subject), subject.tokenizer(),
            subject.test, ctx.progress,
        )  # fmt: skip
        found.write(ctx.folder)
        with house_style():
            drawn = [
                plots.fronts(ctx.folder / f"error_against_l0_x{x:g}.png", matched.whole(found.tables["cells"]), x)
                for x in c.train.expansions
            ]
            drawn.append(plots.by_group(ctx.folder / "error_by_group.png", found.tables["groups"], chosen))
        return {"chosen": chosen, **found.tables, "plots": [path.name for path in drawn]}

    def interpret(self, ctx: StepContext) -> dict[str, Any]:
        """An index of one SAE per method and kind, and what a judge says of its features."""
        how, subject, saes = self.config.interpret, subject_of(ctx, "corpus"), self._saes(ctx)
        chosen = [name for name in ctx.result("measure")["chosen"] if _kind(name) in how.kinds]
        folders = index_features(
            ctx.folder / "indexes", {name: saes[name]() for name in chosen}, self.rows(ctx.path("heldout")), subject,
            top=max(10, how.shown),
        )  # fmt: skip
        ratings, scores = interpret.read_features(
            dict(zip(chosen, folders, strict=True)), how.judge, features=how.features, shown=how.shown,
            scored=how.scored, seed=self.config.seed, progress=ctx.progress,
        )  # fmt: skip
        return {"ratings": ratings, "scores": scores, "judge": interpret.open_judge(how.judge)[1]}

    def steer(self, ctx: StepContext) -> dict[str, Any]:
        """The features of special tokens added to the activations, beside controls."""
        how, subject = self.config.steer, subject_of(ctx, "corpus")
        fitting = [n for n in ctx.result("measure")["chosen"] if n.startswith(f"{how.method}/{how.kind}-")]
        if not fitting:
            return {"special_features": [], "rows": [], "plots": []}
        sae, tokenizer = self._saes(ctx)[fitting[0]](), subject.tokenizer()
        special, held = special_ids(tokenizer, self.config.data.special), self.rows(ctx.path("heldout"))
        features = steer.strongest(sae, held, places_of(held.columns(("token_id", "sample_id")), special))
        ids = [ids[0] for ids in special.values() if len(ids) == 1]
        judge = self.config.interpret.judge
        chat = None if judge.model in ("rule", "none") else interpret.open_judge(judge)[0]
        rows, texts = steer.steered(
            self.load_model(subject), tokenizer, sae, features, ids,
            strengths=how.strengths, questions=how.questions, controls=how.controls, new_tokens=how.new_tokens,
            chat=chat, seed=self.config.seed,
        )  # fmt: skip
        write_csv_atomic(ctx.folder / "answers.csv", texts)
        with house_style():
            path = plots.doses(ctx.folder / "steering.png", rows)
        return {"sae": fitting[0], "special_features": features, "rows": rows, "plots": [path.name]}

    def package(self, ctx: StepContext) -> dict[str, Any]:
        """A release of every SAE, with tables, pictures, index, pages and the card over all of it."""
        c, about, found = self.config, ctx.result("corpus"), ctx.result("measure")
        tables = self._tables(ctx)
        public = [s.id for s in (*c.data.chats, c.data.texts)] if "world" not in about else []
        package(
            ctx.folder, self._saes(ctx), name=c.name, base_model=about["label"], license=c.license, datasets=public,
            description=" ".join([self._words(about), *report.findings(found["advantage"])]),
            measures=Measures.read(ctx.path("measure")), tables={name: rows for name, rows in tables.items() if rows},
            plots=self._plots(ctx), card="instruct", subject=subject_of(ctx, "corpus"), progress=ctx.progress,
        )  # fmt: skip
        return {"ids": add_pages(ctx.folder, ctx.path("interpret") / "indexes", c.name).ids}

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """The report, and its lines for the terminal."""
        about = ctx.result("corpus") | {
            "held": ctx.result("heldout")["tokens"],
            "judge": ctx.result("interpret")["judge"],
            "failed": {m: ctx.result(f"train/{m}")["failed"] for m in self.config.train.methods},
        }
        path = report.write(ctx.folder, self.config, about, self._tables(ctx), self._plots(ctx))
        return {"report": path.name, "lines": report.findings(ctx.result("measure")["advantage"])}

    def _tables(self, ctx: StepContext) -> dict[str, list[dict[str, Any]]]:
        found, read, steered = ctx.result("measure"), ctx.result("interpret"), ctx.result("steer")
        names = ("advantage", "cells", "groups", "splice", "gsnr")
        return {
            **{name: found[name] for name in names},
            "chosen_groups": [row for row in found["groups"] if row["id"] in found["chosen"]],
            "ratings": read["ratings"], "scores": read["scores"],
            "special_features": steered["special_features"], "steering": steered["rows"],
        }  # fmt: skip

    def _plots(self, ctx: StepContext) -> list[Path]:
        return [ctx.path(step) / name for step in ("measure", "steer") for name in ctx.result(step)["plots"]]

    def _saes(self, ctx: StepContext) -> dict[str, Any]:
        """Every SAE that was trained, as functions that load them, by `method/cell`."""
        names = [cell.id for cell in cells(self.config.train)]
        return {
            f"{method}/{name}": load
            for method in self.config.train.methods
            for name, load in trained(ctx.path(f"train/{method}"), names, pick_device()).items()
        }

    def _words(self, about: dict[str, Any]) -> str:
        return (
            f"SAEs on layer {self.config.data.layer} of {about['label']}, trained on chats one at a time (FAST), on "
            "the same chats packed into blocks (BT(F)) and on packed plain texts (BT(P)), and compared at equal L0."
        )


def _kind(name: str) -> str:
    return name.partition("/")[2].partition("-")[0]
