"""The reward model and what it scores: problems, the model that is given or made here, solutions with their scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hubsae.core.files import write_csv_atomic
from hubsae.recipes.standard import pick_device
from hubsae.recipes.steps import StepContext
from hubsae.recipes.subject import Subject, fetch_subject, subject_of
from hubsae.rl.problems import PromptStyle
from hubsae.rl.reward_models import RewardModel, load_reward_model

from . import data, prm
from .errors import RIGHT, Solution, solutions
from .settings import Config

HELD_OUT = 1_000_000
"""Problems held out are numbered from here on"""


class Scored:
    """The steps up to the scores; the recipe's own class goes on from there."""

    def __init__(self, config: Config):
        self.config, self.device = config, pick_device(config.device)

    def subject(self, ctx: StepContext) -> dict[str, Any]:
        """Base model and problems: made, opened or downloaded, and fixed."""
        return fetch_subject(ctx.folder, self.config.model, self.config.data, self.config.seed, ctx.progress)

    def prm(self, ctx: StepContext) -> dict[str, Any]:
        """A reward model that exists, or one made here; how well it tells wrong steps from right ones."""
        c, subject = self.config, subject_of(ctx)
        if c.prm.id is not None:
            return {"model": c.prm.id, "label": c.prm.id, "next": 0}
        chosen = self._solutions(subject, subject.train, most=c.data.prm, wrong=(0.5,) * c.prm.versions, seed=c.seed)
        losses = prm.train_prm(
            c.prm, ctx.folder, subject.model, subject.tokenizer(), chosen, c.data.formats()[0], seed=c.seed,
            device=self.device, revision=subject.revision, progress=ctx.progress,
        )  # fmt: skip
        held = self._solutions(subject, subject.test, most=c.data.test, first=HELD_OUT, seed=c.seed + 1)
        rows = prm.step_auc(load_reward_model(ctx.folder / "model", device=self.device), held)
        write_csv_atomic(ctx.folder / "auc.csv", rows)
        loss = float(np.mean([row["loss"] for row in losses[-20:]]))
        return {"model": "model", "label": f"{subject.label}-prm", "next": chosen[-1].problem + 1,
                "solutions": len(chosen), "loss": loss, "auc": rows[0]}  # fmt: skip

    def scores(self, ctx: StepContext) -> dict[str, Any]:
        """Solutions to problems that the reward model did not learn from, with the score of every step."""
        c, subject, reward, first = self.config, subject_of(ctx), self.reward(ctx), ctx.result("prm")["next"]
        candidates = (0.0, *[1.0] * (c.data.candidates - 1))
        parts = {
            "train": self._solutions(subject, subject.train[first:], most=c.data.train, first=first, seed=c.seed),
            "test": self._solutions(subject, subject.test, most=c.data.test, first=HELD_OUT, seed=c.seed,
                                    wrong=candidates),
        }  # fmt: skip
        counts = {}
        for name, found in parts.items():
            ctx.progress(0, None, f"{name}: {len(found)} solutions")
            scored = [dataclasses.replace(s, scores=tuple(v.tolist()))
                      for s, v in zip(found, reward.score([s.text for s in found]), strict=True)]  # fmt: skip
            data.write(ctx.folder / f"{name}.jsonl", scored)
            counts[name] = {"solutions": len(scored), "problems": len({s.problem for s in scored}),
                            "steps": sum(len(s.steps) for s in scored),
                            "wrong": sum(s.kind != RIGHT for s in scored)}  # fmt: skip
        return counts

    def _solutions(self, subject: Subject, rows: Any, **options: Any) -> list[Solution]:
        d, tokenizer = self.config.data, subject.tokenizer()
        style = PromptStyle(d.system)
        render = (lambda q: style.render(tokenizer, q)) if d.chat else (lambda q: f"{q}\n")
        return solutions(rows, render, longest=d.longest, **options)

    def model(self, ctx: StepContext) -> str:
        """Where the reward model is: made here, or named."""
        made = ctx.path("prm") / "model"
        return str(made) if made.is_dir() else ctx.result("prm")["model"]

    def reward(self, ctx: StepContext) -> RewardModel:
        """The reward model, on the device."""
        p = self.config.prm
        return load_reward_model(self.model(ctx), revision=p.revision, separator=self.config.data.separator,
                                 device=self.device, dtype=p.dtype)  # fmt: skip
