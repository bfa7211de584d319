"""The demo's second half: publish to a hub on this machine, load back twice, steer, and say where everything lies."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubsae.recipes.demo.steps import DemoSize, load_stage, open_world

Say = Callable[[str], None]

REPO = "local/hubsae-demo"
LOCK = ".demo-lock"

# runs in a process of its own, which imports sae_lens and never hubsae
STOCK_SAELENS = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from sae_lens import SAE
repo, sae_id, source, target = sys.argv[1:]
sae = SAE.from_pretrained(repo, sae_id)
x = torch.load(source, weights_only=True)
torch.save({"z": sae.encode(x).detach(), "x_hat": sae(x).detach(), "hubsae": "hubsae" in sys.modules}, target)
"""


@dataclass
class Agreement:
    """How stock SAELens and hubsae compare on the same repo and tokens."""

    tokens: int
    same_support: bool
    relative_error: float


def publish(run: Path, hub: Any, say: Say) -> str:
    """Push the release with the real client; the page's address."""
    from hubsae.hub.push import push

    result = push(run / "release", REPO, token=hub.token, endpoint=hub.url, notify=say, bar=False, license="apache-2.0")
    where = "committed" if result.committed else "already there, unchanged; no commit made"
    say(f"{len(result.plan.rows)} SAEs, one commit {(result.commit or '')[:8]} ({where})")
    return f"{hub.url}/{REPO}"


def load_back(run: Path, hub: Any, size: DemoSize) -> Any:
    """One SAE of the release, chosen by stage and layer, as anyone would load it."""
    from hubsae.hub.sae import HubSAE

    return HubSAE.from_pretrained(
        REPO, layer=size.layers[-1], stage=size.stages[-1],
        endpoint=hub.url, token=hub.token, cache_dir=run / "cache" / "hub",
    )  # fmt: skip


def held_out(run: Path, size: DemoSize) -> torch.Tensor:
    """Validation activations of the last stage and layer."""
    from hubsae.activations import ActivationDataset

    config = f"{size.stages[-1]}.layers.{size.layers[-1]}"
    return ActivationDataset.open(run / "activations", config, "validation").read_all(2048).float()


def compare_with_saelens(run: Path, hub: Any, sae: Any, x: torch.Tensor) -> Agreement | None:
    """Load the same SAE in stock SAELens; None where it is not installed."""
    if importlib.util.find_spec("sae_lens") is None:
        return None
    scratch = run / "cache"
    scratch.mkdir(exist_ok=True)
    source, target = scratch / "x.pt", scratch / "saelens.pt"
    torch.save(x, source)
    done = subprocess.run(
        [sys.executable, "-c", STOCK_SAELENS, REPO, sae.metadata.id, str(source), str(target)],
        env=hub.env(home=scratch), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        from hubsae.core.errors import HubSAEError

        raise HubSAEError(f"stock SAELens could not load the release: {done.stderr.strip().splitlines()[-1]}")
    theirs = torch.load(target, weights_only=True)
    z, x_hat = sae.encode(x), sae(x)
    return Agreement(
        tokens=len(x),
        same_support=bool(torch.equal(z != 0, theirs["z"] != 0)) and not theirs["hubsae"],
        relative_error=float((x_hat - theirs["x_hat"]).norm() / x_hat.norm()),
    )


@dataclass
class Steered:
    """A prompt answered as it is, and with one feature turned up."""

    feature: int
    strength: float
    question: str
    before: str
    after: str


def steer_once(run: Path, size: DemoSize, sae: Any, x: torch.Tensor, result: dict[str, Any]) -> Steered | None:
    """Turn up one feature, as gently as changes the answer to a held-out problem."""
    tiny = open_world(result)
    model, tokenizer = load_stage(tiny, run / "policy", size.stages[-1]), tiny.tokenizer
    problem = tiny.test_problems[0]
    prompt = torch.tensor([tiny.prompt_ids(problem)])

    def answer() -> str:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
        return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()

    before = answer()
    z = sae.encode(x)
    density, peak = (z > 0).float().mean(0), z.max(0).values
    # features that fire everywhere or almost never say little; among the rest the strongest first
    order = (peak * ((density > 0.005) & (density < 0.2))).argsort(descending=True)
    # the gentlest push that changes the answer says most: strong ones break the model's sentences
    for share in (0.5, 1.0, 2.0):
        for feature in order[:12].tolist():
            strength = share * float(peak[feature])
            with sae.steer(model, feature=feature, strength=strength):
                after = answer()
            if after != before:
                return Steered(feature, strength, problem.question, before, after)
    return None


def writable(folder: Path) -> bool:
    """Whether `folder` can be made and written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def claim(folder: Path) -> Any:
    """The lock of a demo's folder, held; None where another demo holds it."""
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    return lock
