"""The demo's second half: publish to a hub on this machine, load back twice, steer, and say where everything lies."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubsae.core.files import read_json

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


@dataclass(frozen=True)
class Demo:
    """A finished run of `rl_chain` or `first_look`, with what the tour shows of it."""

    run: Path
    stage: str | None
    """The last one; None for a single SAE."""
    layer: int

    @property
    def adapter(self) -> Path:
        """The last stage of reinforcement learning."""
        return self.run / "rl" / "stages" / (self.stage or "")


def publish(demo: Demo, hub: Any, say: Say) -> str:
    """Push the release with the real client; the page's address."""
    from hubsae.hub.push import push

    release = demo.run / "release"
    result = push(release, REPO, token=hub.token, endpoint=hub.url, notify=say, bar=False, license="apache-2.0")
    where = "committed" if result.committed else "already there, unchanged; no commit made"
    count = len(result.plan.rows)
    say(f"{count} SAE{'' if count == 1 else 's'}, one commit {(result.commit or '')[:8]} ({where})")
    return f"{hub.url}/{REPO}"


def load_back(demo: Demo, hub: Any) -> Any:
    """One SAE of the release, chosen by stage and layer, as anyone would load it."""
    from hubsae.hub.sae import HubSAE

    return HubSAE.from_pretrained(
        REPO, layer=demo.layer, stage=demo.stage,
        endpoint=hub.url, token=hub.token, cache_dir=demo.run / "cache" / "hub",
    )  # fmt: skip


def held_out(demo: Demo) -> torch.Tensor:
    """Validation activations of the last stage and layer."""
    from hubsae.recipes.standard import Activations

    folder = demo.run / "activations" / ("prompt-response" if demo.stage else "")
    return Activations(folder).open(demo.layer, "validation", demo.stage).read_all(2048).float()


def compare_with_saelens(demo: Demo, hub: Any, sae: Any, x: torch.Tensor) -> Agreement | None:
    """Load the same SAE in stock SAELens; None where it is not installed."""
    if importlib.util.find_spec("sae_lens") is None:
        return None
    scratch = demo.run / "cache"
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
    word: str = ""
    """What the feature fires on, where that is one word."""


QUESTION = "Tell me a short story about a walk in the park."
CANDIDATES = 16
"""Features tried."""


def steer_once(demo: Demo, sae: Any, x: torch.Tensor) -> Steered | None:
    """Turn up one feature: of a chain, as gently as changes an answer; of one SAE, so that its word is said."""
    from hubsae.core.quiet import quiet
    from hubsae.recipes.subject import open_subject
    from hubsae.rl.stages import parse_checkpoint

    step = "source" if demo.stage else "subject"
    subject = open_subject(demo.run / step, read_json(demo.run / ".steps" / f"{step}.json")["result"])
    if demo.stage is None:
        return _steer_to_word(demo, sae, _Asked(subject.load(), subject.tokenizer(), QUESTION, 24))
    with quiet():
        model = parse_checkpoint(demo.stage, str(demo.adapter), subject.model).load()
    return _steer_answer(sae, x, _Asked(model, subject.tokenizer(), subject.problems("test")[0].question, 40))


class _Asked:
    """A question to a model, answered greedily: as the model is, or with one feature turned up."""

    def __init__(self, model: Any, tokenizer: Any, question: str, length: int):
        from hubsae.rl.problems import PromptStyle

        self.model, self.tokenizer, self.question, self.length = model, tokenizer, question, length
        text = PromptStyle().render(tokenizer, question)
        self.prompt = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        self.before = self.answer()

    def answer(self) -> str:
        prompt = self.prompt
        out = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=self.length, do_sample=False
        )
        return self.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()

    def steered(self, sae: Any, feature: int, strength: float) -> Steered:
        with sae.steer(self.model, feature=feature, strength=strength, unit=False):
            return Steered(feature, strength, self.question, self.before, self.answer())


def _steer_to_word(demo: Demo, sae: Any, asked: _Asked) -> Steered | None:
    """A feature of one word that, turned up, makes the model say that word where it did not."""
    from hubsae.index.features import FeatureIndex

    index = FeatureIndex.open(demo.run / "release", sae.metadata.id)
    known = {name: index.metrics[name].to_pylist() for name in ("purity", "max", "top_token")}
    words = {f: known["top_token"][f].strip().lower() for f in index.readable() if known["purity"][f] >= 0.6}
    unsaid = {f: w for f, w in words.items() if w.isalpha() and len(w) >= 5 and w not in asked.before.lower()}
    best: tuple[int, Steered] | None = None
    for feature in sorted(unsaid, key=lambda f: -known["purity"][f] * known["max"][f])[:CANDIDATES]:
        tried = asked.steered(sae, feature, 2.0 * known["max"][feature])
        tried.word = words[feature]
        said = tried.after.lower().count(tried.word)
        if said and (best is None or said > best[0]):
            best = said, tried
        if said > 1:
            break
    return best[1] if best else None


def _steer_answer(sae: Any, x: torch.Tensor, asked: _Asked) -> Steered | None:
    """Turn up one feature, as gently as changes the answer."""
    z = sae.encode(x)
    density, peak = (z > 0).float().mean(0), z.max(0).values
    # features that fire everywhere or almost never say little; among the rest the strongest first
    order = (peak * ((density > 0.005) & (density < 0.2))).argsort(descending=True)
    # the gentlest push that changes the answer says most: strong ones break the model's sentences
    for share in (0.5, 1.0, 2.0):
        for feature in order[:12].tolist():
            tried = asked.steered(sae, feature, share * float(peak[feature]))
            if tried.after != tried.before:
                return tried
    return None


def lock_folder(folder: Path) -> Any:
    """The lock of a demo's folder, held; None where another demo holds it or it cannot be written."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except (OSError, filelock.Timeout):
        return None
    return lock
