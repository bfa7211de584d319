"""Chains of SAEs along reinforcement learning: does the feature space drift with the reward or with the updates?

    source -> rl -> accuracy, merge -> activations -> chains -> evaluation -> drift -> release -> report

The policy is fine-tuned on word problems under one reward; at the listed steps a stage is kept. From every stage the
same texts give activations, and per layer one SAE follows the stages, each warm-started from the one before. A control
chain trains as long on the base model's activations, because a warm-started chain improves by training alone.

Stages can also be checkpoints that exist already: `stages={ppo_step10: ./ckpt/10, ppo_step30: me/repo@step30}`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hubsae.activations import harvest
from hubsae.core.files import read_csv, read_json, write_csv_atomic, write_json_atomic
from hubsae.core.metadata import Metric
from hubsae.core.text import stage_step
from hubsae.evals import compare, reconstruction, write_report
from hubsae.evals.splice import splice_many
from hubsae.recipes.standard import Activations, package, pick_device, publish, tables_in
from hubsae.recipes.steps import Estimate, Step, StepContext
from hubsae.recipes.subject import Subject, fetch_subject, subject_of
from hubsae.rl.accuracy import accuracy
from hubsae.rl.config import METHOD
from hubsae.rl.ppo import PPO
from hubsae.rl.problems import make_prompts
from hubsae.rl.rollout import Sampling
from hubsae.rl.stages import merge_loss
from hubsae.rl.warmup import warm_up
from hubsae.train import train_chain

from . import chain as common
from . import estimates
from .plots import plot_learning
from .report import write_chain_report
from .settings import ChainConfig, Member, Mode, harvest_step

Config = ChainConfig
HERE = Path(__file__).parent


def steps(config: Config) -> list[Step]:
    """Every step, in order."""
    run, names, cost = _Run(config), config.stage_names(), estimates.simple(config)
    # what decides which checkpoints the stages are, beside the steps that make them
    stages = {"stages": names, "given": config.stages, "control_steps": config.control_steps, "seed": config.seed}

    world = {"model": config.model, "data": config.data, "seed": config.seed}
    plan = [Step("source", run.source, world, estimate=cost["source"])]
    policy: tuple[str, ...] = ("source",)
    if config.warmup is not None:
        settings = {"warmup": config.warmup, "seed": config.seed}
        plan.append(Step("warmup", run.warmup, settings, policy, estimate=estimates.warmup(config, config.warmup)))
        policy = ("source", "warmup")
    if config.rl is not None and config.runs_rl:
        estimate = estimates.reinforcement(config, config.rl)
        plan.append(Step("rl", run.rl, {"rl": config.rl, **stages}, policy, resumes=True, estimate=estimate))
        policy = (*policy, "rl")

    graded = [f"accuracy/{stage}" for stage in config.harvested_stages()]
    for name, stage in zip(graded, config.harvested_stages(), strict=True):
        settings = {"stage": stage, "evaluation": config.evaluation, **stages}
        plan.append(Step(name, run.accuracy, settings, policy, estimate=cost["accuracy"]))
    plan.append(Step("merge", run.merge, stages, policy, estimate=cost["merge"]))

    harvested = [harvest_step(mode) for mode in config.harvest.modes]
    trained_on = harvest_step(config.harvest.train_on)
    for mode, name in zip(config.harvest.modes, harvested, strict=True):
        settings, estimate = {"mode": mode, "harvest": config.harvest, **stages}, estimates.activations(config, mode)
        plan.append(Step(name, run.activations, settings, policy, resumes=True, estimate=estimate))

    chains, sae = [member.step for member in config.members()], config.sae.model_dump(mode="json", exclude={"chains"})
    for number, member in enumerate(config.members()):
        settings = {"sae": sae, "member": number, **member.columns, **stages}
        estimate = estimates.chain(config, member.chain)
        plan.append(Step(member.step, run.chain, settings, ("source", trained_on), resumes=True, estimate=estimate))

    evaluated = [f"evaluation/{stage}" for stage in names]
    for name, stage in zip(evaluated, names, strict=True):
        settings = {"stage": stage, "evaluation": config.evaluation, "harvest": config.harvest, **stages}
        needs = (*policy, *harvested, *chains)
        plan.append(Step(name, run.evaluation, settings, needs, estimate=cost["evaluation"]))

    others = {"compare": config.compare, "theirs": [common.run_fingerprint(Path(other)) for other in config.compare]}
    plan.append(Step("drift", run.drift, {**others, **stages}, (trained_on, *chains), estimate=cost["drift"]))
    about = {"name": config.name, "about": config.about}
    needs = (*policy, *chains, *evaluated, "drift")
    plan.append(Step("release", run.release, about, needs, estimate=cost["release"]))
    needs = (*policy, *graded, "merge", *evaluated, "drift", "release")
    settings = config.model_dump(mode="json", exclude={"publish"})
    what = Estimate("results beside the published numbers, figures")
    plan.append(Step("report", run.report, settings, needs, estimate=what))
    if config.publish.release or config.publish.activations:
        what = Estimate(f"push to {', '.join(filter(None, (config.publish.release, config.publish.activations)))}")
        plan.append(Step("publish", run.publish, config.publish, ("report", "release", trained_on), estimate=what))
    return plan


class _Run:
    """The steps' code; holds the config and nothing else."""

    def __init__(self, config: Config):
        self.config = config
        self.device = pick_device(config.device)

    def source(self, ctx: StepContext) -> dict[str, Any]:
        """Model and problems: made, opened or downloaded, and fixed."""
        return fetch_subject(ctx.folder, self.config.model, self.config.data, self.config.seed, ctx.progress)

    def warmup(self, ctx: StepContext) -> dict[str, Any]:
        """A few supervised steps on the answer format; the chain starts from what comes out."""
        config, source = self.config, _source(ctx)
        assert config.warmup is not None
        losses = warm_up(
            config.warmup, ctx.folder, model=source.model, revision=source.revision, tokenizer=source.tokenizer(),
            questions=source.problems(), style=config.data.style(), seed=config.seed, device=self.device,
            progress=ctx.progress,
        )  # fmt: skip
        return {"first": losses[0]["loss"], "last": losses[-1]["loss"]}

    def rl(self, ctx: StepContext) -> dict[str, Any]:
        """Reinforcement learning, with a stage kept at every listed step."""
        config, rl, source = self.config, self.config.rl, _source(ctx)
        assert rl is not None
        tokenizer, style, test = source.tokenizer(), config.data.style(), source.problems("test")
        shuffled = config.seed if rl.shuffled_gold else None
        PPO(
            rl, ctx.folder, model=source.model, revision=source.revision, name=source.label, tokenizer=tokenizer,
            train=make_prompts(
                tokenizer, source.problems(), style, max_prompt=rl.max_prompt, shuffle_gold_seed=shuffled
            ),
            test=make_prompts(tokenizer, test[: rl.test_problems], style, max_prompt=rl.max_prompt),
            seed=config.seed, device=self.device,
        ).run(ctx.progress)  # fmt: skip
        return {"method": METHOD, "stages": rl.stage_names(), "last": read_csv(ctx.folder / "metrics.csv")[-1]}

    def accuracy(self, ctx: StepContext) -> dict[str, Any]:
        """Held-out accuracy of one stage, by every scorer."""
        config, source, settings = self.config, _source(ctx), self.config.evaluation
        tokenizer, style = source.tokenizer(), config.data.style()
        longest = (config.rl.max_prompt, config.rl.max_response) if config.rl else (512, config.harvest.max_new_tokens)
        test = source.problems("test")[: settings.accuracy_problems]
        sampling = Sampling(longest[1], settings.accuracy_temperature, settings.rollout_batch)
        model = self._stages(ctx, source)[ctx.settings["stage"]].load(self.device)
        prompts = make_prompts(tokenizer, test, style, max_prompt=longest[0])
        found = accuracy(model, tokenizer, prompts, sampling, seed=config.seed)
        write_json_atomic(ctx.folder / "accuracy.json", found)
        return found

    def merge(self, ctx: StepContext) -> list[dict[str, Any]]:
        """How large each stage's update is, and what bfloat16 or float16 storage would lose of it."""
        stages, rows = self._stages(ctx, _source(ctx)), []
        base = stages[self.config.base_stage].load()
        for number, (name, stage) in enumerate(stages.items()):
            if name == self.config.base_stage or self.config.control_steps:
                continue
            model = stage.load()
            for dtype in (torch.bfloat16, torch.float16):
                lost = merge_loss(base, model, dtype)
                rows.append({"stage": name, "stored_in": str(dtype).removeprefix("torch."), **lost})
            ctx.progress(number, len(stages), name)
        if rows:
            write_csv_atomic(ctx.folder / "merge_loss.csv", rows)
        return rows

    def activations(self, ctx: StepContext) -> dict[str, Any]:
        """Activations of every stage at every layer, on the same problems."""
        config, settings, source = self.config, self.config.harvest, _source(ctx)
        mode: Mode = ctx.settings["mode"]
        stages, own = self._stages(ctx, source), mode == "own"
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
        config, source, names = self.config, _source(ctx), self.config.stage_names()
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
        config, source, stage = self.config, _source(ctx), ctx.settings["stage"]
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
            self._stages(ctx, source)[stage].load(self.device), source.tokenizer(), saes, texts,
            max_length=config.evaluation.splice_max_length, seed=config.seed,
        )  # fmt: skip
        for member in members:
            name = member.id(stage)
            rows += [{**member.columns, "stage": stage, "texts": "held-out", **row} for row in spliced[name].rows()]
            metrics[name] += spliced[name].metrics()
        write_csv_atomic(ctx.folder / "measures.csv", rows)
        return {name: [metric.model_dump(mode="json") for metric in found] for name, found in metrics.items()}

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
        config, source, stages = self.config, _source(ctx), self.config.stage_names()
        title = f"sae-{config.model.label.rpartition('/')[2].lower()}-{config.name}"
        found = {name: m for stage in stages for name, m in ctx.result(f"evaluation/{stage}").items()}
        measures = [row for stage in stages for row in read_csv(ctx.path(f"evaluation/{stage}") / "measures.csv")]
        made = package(
            ctx.folder,
            {m.id(stage): lambda m=m, s=stage: self._sae(ctx, m, s) for stage in stages for m in config.members()},
            name=title, base_model=source.label, description=config.about or None,
            metrics={name: [Metric.model_validate(m) for m in metrics] for name, metrics in found.items()},
            tables={"measures": measures, **tables_in(ctx.path("drift"))},
            plots=sorted(ctx.path("drift").glob("*.png")), subject=source,
            stages={name: stage.load for name, stage in self._stages(ctx, source).items()}, progress=ctx.progress,
        )  # fmt: skip
        return {"name": title, "saes": len(made), "plots": [plot.name for plot in made.plots]}

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """What came out, beside what was published."""
        config = self.config
        learning = ctx.path("rl") if config.runs_rl else None
        if learning is not None:
            plot_learning(learning, ctx.folder / "learning.png")
        return write_chain_report(
            ctx.folder,
            config,
            accuracy={s: ctx.result(f"accuracy/{s}") for s in config.harvested_stages()},
            merge=ctx.result("merge"),
            measures={s: read_csv(ctx.path(f"evaluation/{s}") / "measures.csv") for s in config.stage_names()},
            drift=ctx.path("drift"),
            learning=learning,
            published=HERE,
        )

    def publish(self, ctx: StepContext) -> dict[str, Any]:
        """Push the release and the activations to the Hub."""
        activations = ctx.path(harvest_step(self.config.harvest.train_on))
        return publish(self.config.publish, ctx.path("release"), activations)

    def _stages(self, ctx: StepContext, source: Subject) -> dict[str, Any]:
        return common.checkpoints(self.config, source, ctx.path("rl") if self.config.runs_rl else None)

    def _sae(self, ctx: StepContext, member: Member, stage: str) -> Any:
        ctx.path(member.step)  # only of steps that this one needs
        return common.saes_of(ctx.run_folder, member).get(stage)

    def _record(self, source: Subject, tokens: int) -> dict[str, Any]:
        config = self.config
        own = config.rl is None or config.rl.lora is None
        return {
            "base_model": {
                "id": source.label,
                "revision": source.revision,
                "merge_dtype": None if own else "float32",
                "dtype": config.harvest.model_dtype,
            },
            "hook": {"context_size": config.harvest.max_length, "prepend_bos": False},
            "activations": {"mode": config.harvest.train_on, "text_dataset": config.data.id, "tokens": tokens},
        }


def _source(ctx: StepContext) -> Subject:
    """The model that the chain starts from, with its problems."""
    found = subject_of(ctx, "source")
    if "warmup" in ctx.folders:
        found = replace(found, model=str(ctx.path("warmup") / "model"), revision=None)
    return found
