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
from hubsae.core.files import read_json, write_csv_atomic, write_json_atomic, write_text_atomic
from hubsae.core.metadata import Metric
from hubsae.evals import compare, reconstruction
from hubsae.evals.record import record_metrics
from hubsae.evals.splice import splice_many
from hubsae.formats import Release, native
from hubsae.hub.sae import HubSAE
from hubsae.recipes.report import read_csv
from hubsae.recipes.rl import chain_steps as common
from hubsae.recipes.rl import estimates
from hubsae.recipes.rl.chain_report import write_chain_report
from hubsae.recipes.rl.chain_settings import ChainConfig, ChainSettings, Mode
from hubsae.recipes.rl.config import LABELS
from hubsae.recipes.rl.evaluate import accuracy
from hubsae.recipes.rl.plots import plot_learning
from hubsae.recipes.rl.ppo import PPO
from hubsae.recipes.rl.problems import make_prompts
from hubsae.recipes.rl.rollout import Sampling
from hubsae.recipes.rl.source import Source, fetch_source, open_source
from hubsae.recipes.rl.stages import merge_loss
from hubsae.recipes.rl.trl_trainers import run_trl
from hubsae.recipes.steps import Estimate, Step, StepContext
from hubsae.train import train_chain

Config = ChainConfig
HERE = Path(__file__).parent


def steps(config: Config) -> list[Step]:
    """Every step, in order."""
    run, names = _Run(config), config.stage_names()
    # what decides which checkpoints the stages are, beside the steps that make them
    stages = {"stages": names, "given": config.stages, "control_steps": config.control_steps, "seed": config.seed}

    world = {"model": config.model, "data": config.data, "seed": config.seed}
    plan = [Step("source", run.source, world, estimate=estimates.source(config))]
    policy: tuple[str, ...] = ("source",)
    if config.rl is not None and config.runs_rl:
        policy = ("source", "rl")
        estimate = estimates.reinforcement(config, config.rl)
        plan.append(Step("rl", run.rl, {"rl": config.rl, **stages}, ("source",), resumes=True, estimate=estimate))

    graded = [f"accuracy/{stage}" for stage in config.harvested_stages()]
    for name, stage in zip(graded, config.harvested_stages(), strict=True):
        settings = {"stage": stage, "evaluation": config.evaluation, **stages}
        plan.append(Step(name, run.accuracy, settings, policy, estimate=estimates.accuracy(config)))
    plan.append(Step("merge", run.merge, stages, policy, estimate=estimates.merge(config)))

    harvested: dict[Mode, str] = {mode: f"activations/{common.folder_name(mode)}" for mode in config.harvest.modes}
    trained_on = harvested[config.harvest.train_on]
    for mode, name in harvested.items():
        settings, estimate = {"mode": mode, "harvest": config.harvest, **stages}, estimates.activations(config, mode)
        plan.append(Step(name, run.activations, settings, policy, resumes=True, estimate=estimate))

    chains = [f"chains/{chain.name}/layer{layer}" for chain, layer in config.members()]
    sae = config.sae.model_dump(mode="json", exclude={"chains"})
    for name, (chain, layer) in zip(chains, config.members(), strict=True):
        settings = {"sae": sae, "chain": chain.name, "k": chain.k, "layer": layer, **stages}
        estimate = estimates.chain(config, chain)
        plan.append(Step(name, run.chain, settings, ("source", trained_on), resumes=True, estimate=estimate))

    evaluated = [f"evaluation/{stage}" for stage in names]
    for name, stage in zip(evaluated, names, strict=True):
        settings = {"stage": stage, "evaluation": config.evaluation, "harvest": config.harvest, **stages}
        needs = (*policy, *harvested.values(), *chains)
        plan.append(Step(name, run.evaluation, settings, needs, estimate=estimates.evaluation(config)))

    others = {"compare": config.compare, "theirs": [common.run_fingerprint(Path(other)) for other in config.compare]}
    plan.append(Step("drift", run.drift, {**others, **stages}, (trained_on, *chains), estimate=estimates.drift(config)))
    about = {"name": config.name, "about": config.about}
    needs = ("source", *chains, *evaluated, "drift")
    plan.append(Step("release", run.release, about, needs, estimate=estimates.release(config)))
    needs = (*policy, *graded, "merge", *evaluated, "drift", "release")
    told = Estimate("results beside the published numbers, figures")
    settings = config.model_dump(mode="json", exclude={"publish"})
    plan.append(Step("report", run.report, settings, needs, estimate=told))
    if config.publish.release or config.publish.activations:
        told = Estimate(f"push to {', '.join(filter(None, (config.publish.release, config.publish.activations)))}")
        needs = ("report", "release", trained_on)
        plan.append(Step("publish", run.publish, config.publish, needs, estimate=told))
    return plan


class _Run:
    """The steps' code; holds the config and nothing else."""

    def __init__(self, config: Config):
        self.config = config
        self.device = common.pick_device(config.device)

    @common.calmly
    def source(self, ctx: StepContext) -> dict[str, Any]:
        """Model and problems: made, opened or downloaded, and fixed."""
        config = self.config
        return fetch_source(ctx.folder, config.model, config.data, config.seed, ctx.progress)

    @common.calmly
    def rl(self, ctx: StepContext) -> dict[str, Any]:
        """Reinforcement learning, with a stage kept at every listed step."""
        config, rl, source = self.config, self.config.rl, self._source(ctx)
        assert rl is not None
        tokenizer, style = source.tokenizer(), config.data.style()
        shuffled = config.seed if rl.shuffled_gold else None
        train = make_prompts(tokenizer, source.train, style, max_prompt=rl.max_prompt, shuffle_gold_seed=shuffled)
        test = make_prompts(tokenizer, source.test[: rl.test_problems], style, max_prompt=rl.max_prompt)
        common_options: dict[str, Any] = {
            "model": source.model, "revision": source.revision, "tokenizer": tokenizer, "train": train,
            "seed": config.seed, "device": self.device,
        }  # fmt: skip
        if rl.algorithm == "ppo":
            PPO(rl, ctx.folder, test=test, name=source.label, **common_options).run(ctx.progress)
        else:
            run_trl(rl, ctx.folder, name=source.label, progress=ctx.progress, **common_options)
        return {
            "method": LABELS[rl.algorithm],
            "stages": rl.stage_names(),
            "last": read_csv(ctx.folder / "metrics.csv")[-1],
        }

    @common.calmly
    def accuracy(self, ctx: StepContext) -> dict[str, Any]:
        """Held-out accuracy of one stage, by every scorer."""
        config, source = self.config, self._source(ctx)
        settings = config.evaluation
        tokenizer = source.tokenizer()
        longest = (config.rl.max_prompt, config.rl.max_response) if config.rl else (512, config.harvest.max_new_tokens)
        test = make_prompts(
            tokenizer, source.test[: settings.accuracy_problems], config.data.style(), max_prompt=longest[0]
        )
        sampling = Sampling(longest[1], settings.accuracy_temperature, settings.rollout_batch)
        model = self._stages(ctx, source)[ctx.settings["stage"]].load(self.device)
        found = accuracy(model, tokenizer, test, sampling, seed=config.seed)
        write_json_atomic(ctx.folder / "accuracy.json", found)
        return found

    @common.calmly
    def merge(self, ctx: StepContext) -> list[dict[str, Any]]:
        """How large each stage's update is, and what bfloat16 or float16 storage would lose of it."""
        stages = self._stages(ctx, self._source(ctx))
        rows: list[dict[str, Any]] = []
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

    @common.calmly
    def activations(self, ctx: StepContext) -> dict[str, Any]:
        """Activations of every stage at every layer, on the same problems."""
        config, settings, source = self.config, self.config.harvest, self._source(ctx)
        mode: Mode = ctx.settings["mode"]
        stages = self._stages(ctx, source)
        texts = common.texts_for(mode, source.train[: settings.problems], config.data.style())
        tokenizer, names = source.tokenizer(), config.harvested_stages()
        generation = {"max_new_tokens": settings.max_new_tokens, "temperature": 1.0, "repetition_penalty": 1.0}
        for number, name in enumerate(names):
            ctx.progress(number, len(names), name)
            model = stages[name].load(self.device).to(getattr(torch, settings.model_dtype))
            harvest(
                model, texts, list(settings.layers), out=ctx.folder, tokenizer=tokenizer,
                mode=common.HARVEST_MODES[mode],  # pyright: ignore[reportArgumentType]
                stage=name, dtype=settings.dtype, max_length=None if mode == "own" else settings.max_length,
                generation=generation if mode == "own" else None, seed=config.seed,
                validation_fraction=settings.validation_fraction, split_by=settings.split_by,
                split_seed=config.seed, batch_tokens=settings.batch_tokens, progress=False,
                source={"model": source.label, "text_dataset": config.data.id, "adapter_merge": "float32"},
            )  # fmt: skip
            del model
        return {"mode": mode, "problems": len(texts), "stages": names}

    @common.calmly
    def chain(self, ctx: StepContext) -> list[dict[str, Any]]:
        """One SAE carried along the stages at one layer, and its control."""
        config, source = self.config, self._source(ctx)
        chain = next(c for c in config.sae.chains if c.name == ctx.settings["chain"])
        layer, names = ctx.settings["layer"], config.stage_names()
        data = ctx.path(f"activations/{common.folder_name(config.harvest.train_on)}")

        def opened(split: str) -> dict[str, Any]:
            return {name: common.open_activations(data, config.activation_stage(name), layer, split) for name in names}

        train, validation = opened("train"), opened("validation")
        record = self._record(source, train[names[0]].n_rows)
        trained = train_chain(
            common.train_config(config.sae, chain, layer, record, config.seed),
            train,
            val=validation,
            out=ctx.folder / "training",
            control=config.sae.control and not config.control_steps,
            device=self.device,
            quiet=True,
        )
        for kind, results in (("chain", trained.stages), ("control", trained.control)):
            for name, stage in zip(names, results, strict=bool(results)):
                base = stage.sae.metadata.base_model
                base.stage, base.step = name, _step_of(name)
                native.write(stage.sae, ctx.folder / kind / name)
        rows = [{"chain": chain.name, "k": chain.k, "layer": layer, **row} for row in trained.table()]
        # checkpoints of a finished training are of no use to later steps, and ten times as large as its result
        shutil.rmtree(ctx.folder / "training")
        write_csv_atomic(ctx.folder / "chain.csv", rows)
        return rows

    @common.calmly
    def evaluation(self, ctx: StepContext) -> dict[str, Any]:
        """Reconstruction and splice of one stage's SAEs, on held-out activations and texts of that stage."""
        config, source, stage = self.config, self._source(ctx), ctx.settings["stage"]
        acting = config.activation_stage(stage)
        metrics: dict[str, list[Metric]] = {}
        rows: list[dict[str, Any]] = []
        saes: dict[str, HubSAE] = {}
        for chain, layer in self.config.members():
            name = common.sae_id(chain.name, stage, layer)
            sae = saes[name] = HubSAE.from_pretrained(self._sae_folder(ctx, chain, stage, layer))
            for mode in config.harvest.modes:
                data = ctx.path(f"activations/{common.folder_name(mode)}")
                measured = reconstruction({name: sae}, common.open_activations(data, acting, layer, "validation"))
                where = {"chain": chain.name, "stage": stage, "layer": layer, "k": chain.k, "texts": mode}
                rows += [{**where, **row} for row in measured.rows()]
                if mode == config.harvest.train_on:
                    metrics[name] = measured[name].metrics()
        model = self._stages(ctx, source)[stage].load(self.device)
        texts = common.texts_for(
            config.harvest.train_on if config.harvest.train_on != "own" else "prompt+response",
            source.test[: config.evaluation.splice_texts],
            config.data.style(),
        )
        spliced = splice_many(
            model, source.tokenizer(), saes, texts,
            max_length=config.evaluation.splice_max_length, seed=config.seed,
        )  # fmt: skip
        for chain, layer in self.config.members():
            name = common.sae_id(chain.name, stage, layer)
            where = {"chain": chain.name, "stage": stage, "layer": layer, "k": chain.k, "texts": "held-out"}
            rows += [{**where, **row} for row in spliced[name].rows()]
            metrics[name] += spliced[name].metrics()
        write_csv_atomic(ctx.folder / "measures.csv", rows)
        return {name: [metric.model_dump(mode="json") for metric in found] for name, found in metrics.items()}

    @common.calmly
    def drift(self, ctx: StepContext) -> dict[str, Any]:
        """Drift along the chain and against its control, and beside other chains."""
        config = self.config
        report = common.drift_of_run(ctx.run_folder, config, lambda text: ctx.progress(0, None, text))
        report.write(ctx.folder)
        compared: list[dict[str, Any]] = []
        for other in config.compare:
            theirs = ChainConfig.model_validate(read_json(Path(other) / "run.json")["config"])
            comparison = compare(report, common.drift_of_run(Path(other), theirs))
            compared += comparison.rows()
        if compared:
            write_csv_atomic(ctx.folder / "comparison.csv", compared)
        return {"groups": [group.name for group in report.groups], "compared": len(compared)}

    @common.calmly
    def release(self, ctx: StepContext) -> dict[str, Any]:
        """The packaged release: SAEs with their metrics, tables, plots and card."""
        from hubsae.hub.card import card_of_release, render_card

        config, source = self.config, self._source(ctx)
        title = f"sae-{config.model.label.rpartition('/')[2].lower()}-{config.name}"
        made = Release.create(
            ctx.folder, name=title, base_model=source.label, license="apache-2.0", description=config.about or None
        )
        metrics: dict[str, list[Metric]] = {}
        for stage in config.stage_names():
            for name, found in ctx.result(f"evaluation/{stage}").items():
                metrics[name] = [Metric.model_validate(metric) for metric in found]
            for chain, layer in self.config.members():
                sae = HubSAE.from_pretrained(self._sae_folder(ctx, chain, stage, layer))
                made.add(sae, common.sae_id(chain.name, stage, layer))
        record_metrics(made, metrics)
        measures = [row for s in config.stage_names() for row in read_csv(ctx.path(f"evaluation/{s}") / "measures.csv")]
        made.add_results("measures", measures)
        for table in sorted(ctx.path("drift").glob("*.csv")):
            made.add_results(table.name, read_csv(table))
        for plot in sorted(ctx.path("drift").glob("*.png")):
            made.add_plot(plot.name, plot)
        card = render_card(card_of_release(made.path, f"you/{title}"))
        write_text_atomic(made.path / "README.md", card.text)
        return {"name": title, "saes": len(made), "plots": [plot.name for plot in made.plots]}

    @common.calmly
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

    @common.calmly
    def publish(self, ctx: StepContext) -> dict[str, Any]:
        """Push the release and the activations to the Hub."""
        from hubsae.hub.datasets import push_activations
        from hubsae.hub.push import push

        config, done = self.config, {}
        options: dict[str, Any] = {"private": True} if config.publish.private else {}
        if config.publish.release:
            done["release"] = push(ctx.path("release"), config.publish.release, **options).url
        if config.publish.activations:
            folder = ctx.path(f"activations/{common.folder_name(config.harvest.train_on)}")
            done["activations"] = push_activations(folder, config.publish.activations, **options).url
        return done

    def _source(self, ctx: StepContext) -> Source:
        return open_source(ctx.path("source"), ctx.result("source"))

    def _stages(self, ctx: StepContext, source: Source) -> dict[str, Any]:
        return common.checkpoints(self.config, source, ctx.path("rl") if self.config.runs_rl else None)

    def _sae_folder(self, ctx: StepContext, chain: ChainSettings, stage: str, layer: int) -> Path:
        return ctx.path(f"chains/{chain.name}/layer{layer}") / "chain" / stage

    def _record(self, source: Source, tokens: int) -> dict[str, Any]:
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


def _step_of(stage: str) -> int:
    digits = stage[len(stage.rstrip("0123456789")) :]
    return int(digits) if digits else 0
