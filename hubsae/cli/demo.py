"""`hubsae demo`: the whole journey on this machine, offline: train, measure, publish, load back, steer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hubsae.recipes.registry import PreparedRun
    from hubsae.recipes.run import StepEvent

PANEL = "Recipes and demo"

STEPS = {
    "source": (
        "A small language model learns word problems (Qwen2 architecture, made on the spot)",
        "hubsae recipe run rl_chain --config strict --profile demo      # all of the following",
    ),
    "rl": ("Reinforcement learning (PPO) under a strict reward: the answer must end in #### number", ""),
    "activations": (
        "Harvest its residual stream at {layers} at three stages: before, during and after",
        "hubsae harvest --model CHECKPOINT --dataset openai/gsm8k --layers 1,3 --mode prompt+response --out acts/",
    ),
    "chains": (
        "Train a chain of sparse autoencoders, each stage warm-started from the one before",
        "hubsae train CONFIG.yaml",
    ),
    "drift": (
        "Measure drift between the stages, package everything as a release",
        "hubsae package saes/ --out release/ --base-model ORG/MODEL\nhubsae drift release/ --activations acts/",
    ),
}
"""What is announced when the first step of a group begins, and what a person would type to do the same."""


def command(
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: hubsae-demo in the temporary folder).")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A smaller model and fewer tokens: under a minute.")] = False,
) -> None:
    """Run the whole journey on this machine, offline: train, measure, publish, load back, steer.

    Run it again and finished steps are skipped; stop it with Ctrl-C and the next run continues.
    """
    from hubsae.core.errors import TrainingInterrupted
    from hubsae.recipes.registry import prepare

    profile = "fast" if fast else "demo"
    folder, lock = _open_folder(keep, profile)
    with lock:
        teller = _Teller()
        prepared = prepare("rl_chain", profile=profile, variant="strict", out=folder, notify=teller.tell, show=None)
        teller.layers = " and ".join(f"layer {layer}" for layer in _places(prepared)[0])
        try:
            prepared.execute()
        except (KeyboardInterrupt, TrainingInterrupted):
            _print(f"\nstopped; finished steps are kept in {folder}, the same command continues")
            raise KeyboardInterrupt from None
        layers, stages = _places(prepared)
        _tour(folder, layers[-1], stages[-1])


def _places(prepared: PreparedRun) -> tuple[tuple[int, ...], list[str]]:
    """Layers and stages of the run."""
    config: Any = prepared.config
    return config.harvest.layers, config.stage_names()


def _open_folder(keep: Path | None, name: str) -> tuple[Path, Any]:
    """The folder asked for, or one of our own in the temporary folder; and the lock that makes it ours."""
    import os
    import tempfile

    from hubsae.core.errors import HubSAEError
    from hubsae.recipes.tour import lock_folder

    folder = keep if keep is not None else Path(tempfile.gettempdir()) / f"hubsae-{name}"
    lock = lock_folder(folder)
    if lock is None and keep is not None:
        if os.access(folder, os.W_OK):
            raise HubSAEError(
                f"another process is running in {keep}", hint="wait for it, or choose another folder with --keep"
            )
        raise HubSAEError(f"cannot write to {keep}", hint="choose another folder with --keep")
    if lock is None:
        # somebody else's, or another demo is running there: leave it alone
        folder = Path(tempfile.mkdtemp(prefix=f"hubsae-{name}-"))
        lock = lock_folder(folder)
    return folder, lock


class _Teller:
    """Announces each group of steps once, and says what came of it."""

    def __init__(self) -> None:
        self.layers = ""
        self.group = ""

    def tell(self, event: StepEvent) -> None:
        group = event.name.partition("/")[0]
        if event.outcome is None and group != self.group and group in STEPS:
            title, typed = STEPS[group]
            _title(title.format(layers=self.layers), typed)
            self.group = group
        elif event.outcome is not None and group in STEPS:
            how = f"{event.outcome.seconds:.0f} s" if event.outcome.ran else "done by an earlier run"
            result = _result_of(group, event.outcome.result)
            _print(f"  {result} ({how})" if result else f"  {how}")


def _result_of(group: str, result: Any) -> str:
    """What came of a step, in a few words; empty where there is nothing to say."""
    if group == "rl":
        return f"{float(result['last']['score_strict']):.0%} of the last answers satisfy it"
    if group == "chains":
        return f"{len(result)} SAEs of layer {result[0]['layer']}"
    return ""


def _title(text: str, typed: str = "") -> None:
    from hubsae.cli._common import out

    out().print(f"\n[bold]{text}[/]")
    for line in typed.splitlines():
        out().print(f"  [dim]$ {line}[/]", highlight=False)


def _print(text: str) -> None:
    from hubsae.cli._common import out

    out().print(text, markup=False, highlight=False)


def _say(text: str) -> None:
    _print(f"  {text}")


def _tour(run: Path, layer: int, stage: str) -> None:
    from hubsae.localhub import running
    from hubsae.recipes import tour

    demo = tour.Demo(run, stage, layer)
    with running(root=run / "hub") as hub:
        _title(
            "Start a Hub on this machine and publish", f"hubsae hub serve --root hub/\nhubsae push {run.name}/release"
        )
        _say(tour.publish(demo, hub, _say))
        _title("Load one SAE back", f'HubSAE.from_pretrained("{tour.REPO}", layer={layer}, stage="{stage}")')
        sae = tour.load_back(demo, hub)
        _say(f"{sae}")
        x = tour.held_out(demo)
        _title("Load the same one in stock SAELens", f'SAE.from_pretrained("{tour.REPO}", "{sae.metadata.id}")')
        agreement = tour.compare_with_saelens(demo, hub, sae, x)
        if agreement is None:
            _say("sae_lens is not installed here; pip install sae-lens and run again to see it")
        else:
            support = "the same latents fire on every one" if agreement.same_support else "DIFFERENT latents fire"
            _say(f"{agreement.tokens} held-out tokens: {support}, relative difference {agreement.relative_error:.1e}")
        _title(
            "Steer the model with one feature", "with sae.steer(model, feature=..., strength=...): model.generate(...)"
        )
        steered = tour.steer_once(demo, sae, x)
        if steered is None:
            _say("no single feature changed this answer")
        else:
            _say(f"asked    {steered.question}")
            _say(f"answers  {_one_line(steered.before)}")
            _say(f"steered  {_one_line(steered.after)}   (feature {steered.feature}, strength {steered.strength:.1f})")
    _farewell(run)


def _farewell(run: Path) -> None:
    places = (("release", "release"), ("card", "release/README.md"), ("plots", "release/plots"))
    _title("Where it lies")
    for what, where in (*places, ("report", "report/report.md")):
        _say(f"{what:<8} {run / where}")
    _title("The same with your own SAEs")
    for line in (
        "hubsae show   my_saes/                                   # how each file is read, what is unknown",
        "hubsae push   my_saes/ --base-model ORG/MODEL --dry-run   # the plan; without --dry-run it publishes",
        "python -c 'from hubsae import HubSAE; print(HubSAE.from_pretrained(\"YOU/my_saes\", layer=12))'",
    ):
        _say(line)


def _one_line(text: str) -> str:
    return " ".join(text.split())
