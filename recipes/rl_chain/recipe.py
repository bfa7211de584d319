"""Chains of SAEs along reinforcement learning: does the feature space drift with the reward or with the updates?

    source -> rl -> accuracy, merge -> activations -> chains -> evaluation -> drift -> release -> report

The policy is fine-tuned on word problems under one reward; at the listed steps a stage is kept. From every stage the
same texts give activations, and per layer one SAE follows the stages, each warm-started from the one before. A control
chain trains as long on the base model's activations, because a warm-started chain improves by training alone.

Stages can also be checkpoints that exist already: `stages={ppo_step10: ./ckpt/10, ppo_step30: me/repo@step30}`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from hubsae.activations import harvest
from hubsae.core.files import read_csv, read_json, write_csv_atomic
from hubsae.core.metadata import Metric
from hubsae.core.text import stage_step
from hubsae.evals import compare, reconstruction, write_report
from hubsae.evals.splice import splice_many
from hubsae.recipes.standard import Activations, Measures, package, publishing, tables_in
from hubsae.recipes.steps import Step, StepContext, priced
from hubsae.recipes.subject import Subject
from hubsae.train import train_chain

from . import chain as common
from . import estimates
from .plots import plot_learning
from .policy import Policy, source_of
from .report import write_chain_report
from .settings import ChainConfig, Member, Mode, harvest_step

Config = ChainConfig
HERE = Path(__file__).parent


def steps(config: Config) -> list[Step]:
    """Every step, in order."""
    run, names, acting = _Run(config), config.stage_names(), config.harvested_stages()
    # what decides which checkpoints the stages are, beside the steps that make them
    stages = {"stages": names, "given": config.stages, "control_steps": config.control_steps, "seed": config.seed}
    world = {"model": config.model, "data": config.data, "seed": config.seed}
    sae = config.sae.model_dump(mode="json", exclude={"chains"})
    about = {"name": config.name, "about": config.about}
    others = {"compare": config.compare, "theirs": [common.run_fingerprint(Path(other)) for other in config.compare]}
    trained_on, members = harvest_step(config.harvest.train_on), config.members()

    making = [Step("source", run.source, world)]
    if config.warmup is not None:
        making.append(Step("warmup", run.warmup, {"warmup": config.warmup, "seed": config.seed}, ("source",)))
    if config.runs_rl:
        making.append(Step("rl", run.rl, {"rl": config.rl, **stages}, _names(making), resumes=True))
    policy = _names(making)
    graded = [
        Step(f"accuracy/{stage}", run.accuracy, {"stage": stage, "evaluation": config.evaluation, **stages}, policy)
        for stage in acting
    ]
    harvests = [
        Step(harvest_step(mode), run.activations, {"mode": mode, "harvest": config.harvest, **stages}, policy,
             resumes=True)
        for mode in config.harvest.modes
    ]  # fmt: skip
    chains = [
        Step(member.step, run.chain, {"sae": sae, "member": number, **member.columns, **stages},
             ("source", trained_on), resumes=True)
        for number, member in enumerate(members)
    ]  # fmt: skip
    evaluated = [
        Step(f"evaluation/{stage}", run.evaluation,
             {"stage": stage, "evaluation": config.evaluation, "harvest": config.harvest, **stages},
             (*policy, *_names(harvests), *_names(chains)), version=2)
        for stage in names
    ]  # fmt: skip
    measured = (*_names(evaluated), "drift")
    plan = [
        *making, *graded, Step("merge", run.merge, stages, policy), *harvests, *chains, *evaluated,
        Step("drift", run.drift, {**others, **stages}, (trained_on, *_names(chains))),
        Step("release", run.release, about, (*policy, *_names(chains), *measured)),
        Step("report", run.report, config.model_dump(mode="json", exclude={"publish"}),
             (*policy, *_names(graded), "merge", *measured, "release")),
        *publishing(config.publish, trained_on),
    ]  # fmt: skip
    return priced(plan, estimates.by_step(config))


def _names(steps: list[Step]) -> tuple[str, ...]:
    return tuple(step.name for step in steps)


class _Run(Policy):
    """The steps behind the stages."""

    def activations(self, ctx: StepContext) -> dict[str, Any]:
        """Activations of every stage at every layer, on the same problems."""
        config, settings, source = self.config, self.config.harvest, source_of(ctx)
        mode: Mode = ctx.settings["mode"]
        stages, own = self.stages(ctx, source), mode == "own"
        texts = common.texts_for(mode, source.problems()[: settings.problems], config.data.style())
        tokenizer, names = source.tokenizer(), config.harvested_stages()
        generation = {"max_new_tokens": settings.max_new_tokens, "temperature": 1.0, "repetition_penalty": 1.0}
        for number, name in enumerate(names):
            ctx.progress(number, len(names), name)
            model = stages[name].load(self.device).to(getattr(torch, settings.model_dtype))
            harvest(
                model, texts, list(settings.layers), out=ctx.folder, tokenizer=tokenizer,
                mode=common.HARVEST_MODES[mode],  # pyright: ignore[reportArgumentType]
                stage=name, dtype=settings.dtype, max_length=None if own else settings.max_length,
                generation=generation if own else None, seed=config.seed,
                validation_fraction=settings.validation_fraction, split_by=settings.split_by,
                split_seed=config.seed, batch_tokens=settings.batch_tokens, progress=False,
                source={"model": source.label, "text_dataset": config.data.id, "adapter_merge": "float32"},
            )  # fmt: skip
            del model
        return {"mode": mode, "problems": len(texts), "stages": names}

    def chain(self, ctx: StepContext) -> list[dict[str, Any]]:
        """One SAE carried along the stages at one layer, and its control."""
        config, source, names = self.config, source_of(ctx), self.config.stage_names()
        member = config.members()[ctx.settings["member"]]
        data = Activations(ctx.path(harvest_step(config.harvest.train_on)))
        train, validation = (
            {name: data.open(member.layer, split, config.activation_stage(name)) for name in names}
            for split in ("train", "validation")
        )
        record = self._record(source, train[names[0]].n_rows)
        trained = train_chain(
            common.train_config(config.sae, member, record, config.seed), train, val=validation,
            out=ctx.folder / "training", control=config.sae.control and not config.control_steps,
            device=self.device, quiet=True,
        )  # fmt: skip
        for kind, results in (("chain", trained.stages), ("control", trained.control)):
            shelf = common.saes_of(ctx.run_folder, member, kind)
            for name, stage in zip(names, results, strict=bool(results)):
                base = stage.sae.metadata.base_model
                base.stage, base.step = name, stage_step(name)
                shelf.put(name, stage.sae)
        rows = [{**member.columns, **row} for row in trained.table()]
        # checkpoints of a finished training are of no use to later steps, and ten times as large as its result
        shutil.rmtree(ctx.folder / "training")
        write_csv_atomic(ctx.folder / "chain.csv", rows)
        return rows

    def evaluation(self, ctx: StepContext) -> dict[str, Any]:
        """Reconstruction and splice of one stage's SAEs, on held-out activations and texts of that stage."""
        config, source, stage = self.config, source_of(ctx), ctx.settings["stage"]
        acting, members, trained_on = config.activation_stage(stage), config.members(), config.harvest.train_on
        saes = {member.id(stage): self._sae(ctx, member, stage) for member in members}
        metrics: dict[str, list[Metric]] = {}
        rows: list[dict[str, Any]] = []
        for member in members:
            name = member.id(stage)
            for mode in config.harvest.modes:
                held = Activations(ctx.path(harvest_step(mode))).open(member.layer, "validation", acting)
                measured = reconstruction({name: saes[name]}, held)
                rows += [{**member.columns, "stage": stage, "texts": mode, **row} for row in measured.rows()]
                if mode == trained_on:
                    metrics[name] = measured[name].metrics()
        problems = source.problems("test")[: config.evaluation.splice_texts]
        texts = common.texts_for(
            "prompt+response" if trained_on == "own" else trained_on, problems, config.data.style()
        )
        spliced = splice_many(
            self.stages(ctx, source)[stage].load(self.device), source.tokenizer(), saes, texts,
            max_length=config.evaluation.splice_max_length, seed=config.seed,
        )  # fmt: skip
        for member in members:
            name = member.id(stage)
            rows += [{**member.columns, "stage": stage, "texts": "held-out", **row} for row in spliced[name].rows()]
            metrics[name] += spliced[name].metrics()
        Measures(metrics, tables={"measures": rows}).write(ctx.folder)
        return {"saes": len(saes), "texts": len(texts)}

    def drift(self, ctx: StepContext) -> dict[str, Any]:
        """Drift along the chain and against its control, and beside other chains."""
        config = self.config
        report = common.drift_of_run(ctx.run_folder, config, lambda text: ctx.progress(0, None, text))
        write_report(report, ctx.folder)
        compared: list[dict[str, Any]] = []
        for other in config.compare:
            theirs = ChainConfig.model_validate(read_json(Path(other) / "run.json")["config"])
            compared += compare(report, common.drift_of_run(Path(other), theirs)).rows()
        if compared:
            write_csv_atomic(ctx.folder / "comparison.csv", compared)
        return {"groups": [group.name for group in report.groups], "compared": len(compared)}

    def release(self, ctx: StepContext) -> dict[str, Any]:
        """The packaged release: SAEs with their metrics, tables, plots and card."""
        config, source, stages = self.config, source_of(ctx), self.config.stage_names()
        title = f"sae-{config.model.label.rpartition('/')[2].lower()}-{config.name}"
        evaluated = [ctx.path(f"evaluation/{stage}") for stage in stages]
        measures = [row for folder in evaluated for row in read_csv(folder / "measures.csv")]
        made = package(
            ctx.folder,
            {m.id(stage): lambda m=m, s=stage: self._sae(ctx, m, s) for stage in stages for m in config.members()},
            name=title, base_model=source.label, description=config.about or None,
            measures=Measures.read(*evaluated), tables={"measures": measures, **tables_in(ctx.path("drift"))},
            plots=sorted(ctx.path("drift").glob("*.png")), subject=source,
            stages={name: stage.load for name, stage in self.stages(ctx, source).items()}, progress=ctx.progress,
        )  # fmt: skip
        return {"name": title, "saes": len(made), "plots": [plot.name for plot in made.plots]}

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """What came out, beside what was published."""
        config = self.config
        learning = ctx.path("rl") if config.runs_rl else None
        if learning is not None:
            plot_learning(learning, ctx.folder / "learning.png")
        return write_chain_report(
            ctx.folder, config, accuracy={s: ctx.result(f"accuracy/{s}") for s in config.harvested_stages()},
            merge=ctx.result("merge"), drift=ctx.path("drift"), learning=learning, published=HERE,
            measures={s: read_csv(ctx.path(f"evaluation/{s}") / "measures.csv") for s in config.stage_names()},
        )  # fmt: skip

    def _sae(self, ctx: StepContext, member: Member, stage: str) -> Any:
        ctx.path(member.step)  # only of steps that this one needs
        return common.saes_of(ctx.run_folder, member).get(stage)

    def _record(self, source: Subject, tokens: int) -> dict[str, Any]:
        config = self.config
        merged = None if config.rl is None or config.rl.lora is None else "float32"
        model = {"id": source.label, "revision": source.revision, "merge_dtype": merged}
        return {
            "base_model": {**model, "dtype": config.harvest.model_dtype},
            "hook": {"context_size": config.harvest.max_length, "prepend_bos": False},
            "activations": {"mode": config.harvest.train_on, "text_dataset": config.data.id, "tokens": tokens},
        }
