"""Reward features: which SAE features carry a process reward, how early, and whether the base model has them too.

subject      base model and problems, fixed
prm          a process reward model: given, or made here from solutions with errors made by rule
scores       solutions to problems it never saw, each step with its score
harvest/M    activations of reward model, base model and a model with random weights, on the same steps
saes/M       one SAE per layer
probes/M     the score from SAE, raw activations, a random dictionary, shuffled scores, baselines: the table
truncation   the probe at layer L as the reward, without the layers above it
base         reward features matched in the base model, and one of them steered under the reward
rl           PPO against the probe (where the profile asks for it): its accuracy beside its reward
release      SAEs with probes, index and pages; report: the slides' takeaways judged
"""

from __future__ import annotations

import shutil
from typing import Any

import torch

from hubsae.activations import harvest
from hubsae.activations.models import load_tokenizer
from hubsae.core.errors import TrainingError
from hubsae.core.extras import require
from hubsae.core.files import read_csv, write_csv_atomic
from hubsae.core.quiet import quiet
from hubsae.evals import reconstruction
from hubsae.evals.probes import Probe
from hubsae.hub.sae import HubSAE
from hubsae.recipes.standard import Activations, Shelf
from hubsae.recipes.steps import Step, StepContext, priced
from hubsae.recipes.subject import subject_of
from hubsae.rl.truncated import TruncatedReward
from hubsae.train import TrainConfig, train_many
from hubsae.train.config import DeadConfig

from . import base, data, estimates, finish, table, truncate
from .errors import RIGHT
from .report import write_report
from .scored import Scored
from .settings import Config

MOST_ROWS = 4096
"""Ends of steps that the features of two models are compared on"""


def steps(config: Config) -> list[Step]:
    """The steps, each with what it depends on."""
    c, run = config, _Run(config)
    texts: dict[str, Any] = {"seed": c.seed, "model": c.model, "data": c.data}
    plan = [
        Step("subject", run.subject, texts),
        Step("prm", run.prm, {"prm": c.prm, **texts}, ("subject",)),
        Step("scores", run.scores, texts, ("subject", "prm")),
    ]
    made = ("subject", "prm", "scores")
    for of, layers in run.layers.items():
        probed = {"of": of, "probe": c.probe, "seed": c.seed}
        plan += [
            Step(f"harvest/{of}", run.harvest, {"of": of, "layers": layers, **texts}, made, resumes=True),
            Step(f"saes/{of}", run.saes, {"of": of, "sae": c.sae, "seed": c.seed}, (f"harvest/{of}",), resumes=True),
            Step(f"probes/{of}", run.probes, probed, (f"harvest/{of}", f"saes/{of}")),
        ]
    every = tuple(step.name for step in plan[len(made) :])
    probes = (*made, "saes/reward", "probes/reward")
    later = [Step("truncation", run.truncation, {"problems": c.truncation}, probes)]
    if c.base_layers:
        later.append(Step("base", run.base, {"steer": c.steer, "seed": c.seed}, (*made, *every)))
    if c.rl is not None:
        later.append(Step("rl", run.rl, {"rl": c.rl, "layer": c.rl_layer, "seed": c.seed}, probes, resumes=True))
    after = tuple(step.name for step in later)
    plan += [
        *later,
        Step("index", run.index, {"top": c.top}, ("prm", *every)),
        Step("release", run.release, {"name": c.name}, ("subject", "prm", "index", *every, *after)),
        Step("report", run.report, {"name": c.name}, (*made, "index", *every, *after)),
    ]
    return priced(plan, estimates.of(config))


class _Run(Scored):
    """The steps behind the scores."""

    def __init__(self, config: Config):
        super().__init__(config)
        of = {"reward": config.layers, "base": config.base_layers, "untrained": config.untrained_layers}
        self.layers = {name: layers for name, layers in of.items() if layers}

    def harvest(self, ctx: StepContext) -> dict[str, Any]:
        """Activations of one of the models on every solution, with the steps' scores as columns."""
        c, subject, of = self.config, subject_of(ctx), ctx.settings["of"]
        reward = self.reward(ctx)
        how = c.data.formats()[of == "base"]
        tokenizer = subject.tokenizer() if of == "base" else reward.tokenizer
        model = reward.backbone
        if of == "base":
            model = subject.load(self.device, c.model.dtype)
        elif of == "untrained":
            transformers = require("transformers", extra="train")
            with quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(c.seed)
                model = transformers.AutoModel.from_config(reward.backbone.config).to(reward.backbone.device)
        label = {"reward": ctx.result("prm")["label"], "base": subject.label, "untrained": "random weights"}[of]
        for split in ("train", "test"):
            items = data.items_of(tokenizer, data.read(ctx.path("scores") / f"{split}.jsonl"), how)
            harvest(
                model, items, list(self.layers[of]), out=ctx.folder / split, tokenizer=tokenizer, stage=of,
                columns=data.COLUMNS, max_tokens=c.data.tokens, progress=False,
                source={"model": label, "text_dataset": subject.dataset},
            )  # fmt: skip
        first = Activations(ctx.folder / "train").open(self.layers[of][0], "train", of)
        return {"label": label, "tokens": len(first)}

    def saes(self, ctx: StepContext) -> dict[str, Any]:
        """One SAE per layer of one of the models."""
        s, of, acts = self.config.sae, ctx.settings["of"], self._acts(ctx, ctx.settings["of"], "train")
        # another start for each model: features of two that began alike would be found to match by construction
        seed = self.config.seed + list(self.layers).index(of)
        configs = [
            TrainConfig(
                name=f"layer{layer}", architecture="topk", d_sae=s.width, k=s.k, lr=s.lr, seed=seed,
                epochs=s.epochs, batch_size=s.batch_size, exclude=s.exclude, dead=DeadConfig(tokens=s.dead_tokens),
            )
            for layer in self.layers[of]
        ]  # fmt: skip
        rows = [acts.open(layer, "train", of) for layer in self.layers[of]]
        out, fvu = ctx.folder / "training", {}
        for layer, result in zip(self.layers[of], train_many(configs, rows, out=out, device=self.device, quiet=True),
                                 strict=True):  # fmt: skip
            sae = result.sae
            if sae is None:
                raise result.error or TrainingError(f"no SAE came of layer {layer}")
            Shelf(ctx.folder).put(f"layer{layer}", sae)
            held = self._acts(ctx, of, "test").open(layer, "train", of)
            fvu[f"layer{layer}"] = reconstruction({"sae": sae}, held)["sae"].value("fvu", sae.metadata.own_scope)
        shutil.rmtree(out)
        return fvu

    def probes(self, ctx: StepContext) -> list[dict[str, Any]]:
        """The table of one model: every layer, every way to predict the score; the features that carry it."""
        of, how, rows, carriers = ctx.settings["of"], self.config.probe, [], []
        for layer in self.layers[of]:
            ctx.progress(0, None, f"layer {layer}")
            sae, train = self._sae(ctx, of, layer), self._acts(ctx, of, "train")
            found = table.probe_layer(of, layer, sae, train, self._acts(ctx, of, "test"), how, self.config.seed)
            rows += found.rows
            carriers += table.carriers_of(of, layer, found.fits[table.SAE_CODES], sae, train)
            for name in (table.SAE_CODES, table.RAW):
                found.fits[name].probe.save(ctx.folder / f"layer{layer}" / name.split()[0].lower())
        write_csv_atomic(ctx.folder / "table.csv", rows)
        write_csv_atomic(ctx.folder / "carriers.csv", carriers)
        return rows

    def truncation(self, ctx: StepContext) -> list[dict[str, Any]]:
        """Probes as rewards on solutions held out, beside the whole model."""
        found = data.read(ctx.path("scores") / "test.jsonl")
        some = sorted({s.problem for s in found})[: self.config.truncation]
        probes = {
            layer: (self._sae(ctx, "reward", layer), self._probe(ctx, layer, "sae"), self._probe(ctx, layer, "raw"))
            for layer in self.config.layers
        }
        reward, chosen = self.reward(ctx), [s for s in found if s.problem in set(some)]
        rows = truncate.truncated(reward, probes, chosen, reward.backbone.config.num_hidden_layers)
        write_csv_atomic(ctx.folder / "truncation.csv", rows)
        return rows

    def base(self, ctx: StepContext) -> dict[str, Any]:
        """Reward features looked for in the base model; the partner of the strongest is steered."""
        c, subject = self.config, subject_of(ctx)
        layer = max(set(c.layers) & set(c.base_layers), default=None)
        if layer is None:
            return {"matched": None}
        ours, theirs = (self._sae(ctx, of, layer) for of in ("reward", "base"))
        here, there = data.aligned(*(data.rows_at(self._acts(ctx, of, "train").open(layer, "train", of), "step_end")
                                     for of in ("reward", "base")), most=MOST_ROWS)  # fmt: skip
        carriers = [r for r in read_csv(ctx.path("probes/reward") / "carriers.csv") if int(r["layer"]) == layer]
        chosen = [int(row["feature"]) for row in carriers]
        found = base.match(ours, theirs, here, there, chosen)
        random = base.match(ours, table.random_like(theirs, c.seed + 1), here, there, chosen)
        effect = {int(row["feature"]): float(row["effect"]) for row in carriers}
        rows = [{"layer": layer, **m._asdict(), "effect": effect[m.feature]} for m in found]
        write_csv_atomic(ctx.folder / "matched.csv", rows)
        steered = []
        up = [m for m in found if effect[m.feature] > 0]
        if c.steer.prompts and up:
            best = max(up, key=lambda m: effect[m.feature] * max(m.firing, 0))
            asked = [s.prompt for s in data.read(ctx.path("scores") / "test.jsonl") if s.kind == RIGHT]
            steered = base.steer(
                subject.load(self.device, c.model.dtype), subject.tokenizer(), theirs, layer, best.partner, there,
                asked[: c.steer.prompts], self.reward(ctx), c.steer, c.seed,
            )  # fmt: skip
            write_csv_atomic(ctx.folder / "steering.csv", steered)
        return {"matched": base.summary(found, random), "layer": layer, "steered": len(steered)}

    def rl(self, ctx: StepContext) -> dict[str, Any]:
        """PPO of the base model against the probe; accuracies by rule stand beside the reward that it is given."""
        c, subject, reward = self.config, subject_of(ctx), self.reward(ctx)
        layer = c.two_thirds() if c.rl_layer is None else c.rl_layer
        probe = TruncatedReward(
            reward.backbone, reward.tokenizer, self._probe(ctx, layer, "sae"), sae=self._sae(ctx, "reward", layer),
            hook=layer, how=reward.how, aggregate=reward.aggregate,
        )  # fmt: skip
        return {"layer": layer, **finish.against(probe, subject, c, ctx.folder, self.device, ctx.progress)}

    def index(self, ctx: StepContext) -> dict[str, str]:
        """What the features of the reward model fire on; those that carry the score say so in their label."""
        carriers, found = read_csv(ctx.path("probes/reward") / "carriers.csv"), {}
        tokenizer = load_tokenizer(self.model(ctx), revision=self.config.prm.revision)
        for layer in self.config.layers:
            rows = self._acts(ctx, "reward", "train").open(layer, "train", "reward")
            own = [row for row in carriers if int(row["layer"]) == layer]
            sae = self._sae(ctx, "reward", layer)
            found[str(layer)] = finish.index(ctx.folder, layer, sae, rows, own, tokenizer, self.config.top)
        return found

    def release(self, ctx: StepContext) -> dict[str, Any]:
        """The release: SAEs of reward and base model, each with its probe; tables, index, pages, card."""
        tables = {f"{name}_{of}": read_csv(ctx.path(f"probes/{of}") / f"{name}.csv")
                  for of in self.layers for name in ("table", "carriers")}  # fmt: skip
        tables["truncation"] = read_csv(ctx.path("truncation") / "truncation.csv")
        saes = {(of, layer): (self._sae(ctx, of, layer), self._probe(ctx, layer, "sae", of))
                for of in ("reward", "base") for layer in self.layers.get(of, ())}  # fmt: skip
        models = {of: ctx.result(f"harvest/{of}")["label"] for of in self.layers}
        subject = subject_of(ctx)
        loaders = {"reward": lambda: self.reward(ctx).backbone, "base": lambda: subject.load(self.device)}
        loaders = {of: load for of, load in loaders.items() if self.layers.get(of)}
        return finish.release(ctx.folder, self.config.name, saes, tables, models, ctx.path("index"), subject, loaders)

    def report(self, ctx: StepContext) -> dict[str, Any]:
        """The tables, and the takeaways judged by them."""
        shown = finish.contexts(ctx.path("index"), ctx.result("index"), ctx.path("probes/reward"))
        return write_report(self.config, ctx, self.layers, shown)

    def _acts(self, ctx: StepContext, of: str, split: str) -> Activations:
        return Activations(ctx.path(f"harvest/{of}") / split)

    def _sae(self, ctx: StepContext, of: str, layer: int) -> HubSAE:
        where = ctx.folder if ctx.step.name == f"saes/{of}" else ctx.path(f"saes/{of}")
        return Shelf(where).get(f"layer{layer}", self.device)

    def _probe(self, ctx: StepContext, layer: int, kind: str, of: str = "reward") -> Probe:
        return Probe.load(ctx.path(f"probes/{of}") / f"layer{layer}" / kind)
