"""`hubsae demo`: the whole journey on this machine, offline: train, measure, publish, load back, steer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from hubsae.recipes.demo.steps import DemoSize

PANEL = "Recipes and demo"

TITLES = {
    "world": "A small language model learns word problems (Qwen2 architecture, made on the spot)",
    "policy": "Reinforcement learning (PPO) under a strict reward: the answer must end in #### number",
    "activations": "Harvest its residual stream at {layers} at three stages: before, during and after",
    "chain": "Train a chain of sparse autoencoders, each stage warm-started from the one before",
    "release": "Measure drift between the stages, package everything as a release",
}


def command(
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: hubsae-demo in the temporary folder).")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A smaller model and fewer tokens: under a minute.")] = False,
) -> None:
    """Run the whole journey on this machine, offline: train, measure, publish, load back, steer.

    Run it again and finished steps are skipped; stop it with Ctrl-C and the next run continues.
    """
    from hubsae.cli._common import out
    from hubsae.core.errors import TrainingInterrupted
    from hubsae.recipes.demo.steps import SIZES

    name = "fast" if fast else "demo"
    size = SIZES[name]
    console = out()
    run, lock = _open_run(keep, name)
    with lock:
        try:
            _work(run, size, console)
        except (KeyboardInterrupt, TrainingInterrupted):
            console.print(
                f"\nstopped; finished steps are kept in {run.path}, the same command continues", highlight=False
            )
            raise KeyboardInterrupt from None
        _tour(run.path, size, run.result("world"), console)


def _open_run(keep: Path | None, name: str) -> tuple[Any, Any]:
    """The run folder asked for, or one of our own in the temporary folder; and the lock that makes it ours."""
    import tempfile

    from hubsae.core.errors import HubSAEError
    from hubsae.recipes.demo.tour import claim, writable
    from hubsae.recipes.run import RunFolder

    if keep is not None:
        if not writable(keep):
            raise HubSAEError(f"cannot write to {keep}", hint="choose another folder with --keep")
        lock = claim(keep)
        if lock is None:
            raise HubSAEError(
                f"another process is running in {keep}", hint="wait for it, or choose another folder with --keep"
            )
        return RunFolder(keep), lock
    folder = Path(tempfile.gettempdir()) / f"hubsae-{name}"
    lock = claim(folder) if writable(folder) else None
    if lock is None:
        # somebody else's, or another demo is running there: leave it alone
        folder = Path(tempfile.mkdtemp(prefix=f"hubsae-{name}-"))
        lock = claim(folder)
    return RunFolder(folder), lock


def _work(run: Any, size: DemoSize, console: Console) -> None:
    from hubsae.recipes.demo.steps import commands, outcome, steps
    from hubsae.recipes.demo.view import DemoView
    from hubsae.recipes.tiny import single_thread

    layers = " and ".join(f"layer {layer}" for layer in size.layers)
    titles = {name: text.format(layers=layers) for name, text in TITLES.items()}
    run.view = DemoView(console, titles, commands(size), lambda step: outcome(step, run.result(step)))
    with single_thread():
        run.execute(steps(size))


def _tour(run: Path, size: DemoSize, world: dict[str, Any], console: Console) -> None:
    from hubsae.localhub import running
    from hubsae.recipes.demo import tour
    from hubsae.recipes.tiny import single_thread

    def title(text: str, typed: str = "") -> None:
        console.print(f"\n[bold]{text}[/]")
        for line in typed.splitlines():
            console.print(f"  [dim]$ {line}[/]", highlight=False)

    def say(text: str) -> None:
        console.print(f"  {text}", markup=False, highlight=False)

    with running(root=run / "hub") as hub, single_thread():
        title(
            "Start a Hub on this machine and publish", f"hubsae hub serve --root hub/\nhubsae push {run.name}/release"
        )
        page = tour.publish(run, hub, say)
        say(page)

        layer, stage = size.layers[-1], size.stages[-1]
        title("Load one SAE back", f'HubSAE.from_pretrained("{tour.REPO}", layer={layer}, stage="{stage}")')
        sae = tour.load_back(run, hub, size)
        say(f"{sae}")
        x = tour.held_out(run, size)
        title("Load the same one in stock SAELens", f'SAE.from_pretrained("{tour.REPO}", "{sae.metadata.id}")')
        agreement = tour.compare_with_saelens(run, hub, sae, x)
        if agreement is None:
            say("sae_lens is not installed here; pip install sae-lens and run again to see it")
        else:
            support = "the same latents fire on every one" if agreement.same_support else "DIFFERENT latents fire"
            say(f"{agreement.tokens} held-out tokens: {support}, relative difference {agreement.relative_error:.1e}")

        title(
            "Steer the model with one feature", "with sae.steer(model, feature=..., strength=...): model.generate(...)"
        )
        steered = tour.steer_once(run, size, sae, x, world)
        if steered is None:
            say("no single feature changed this answer")
        else:
            say(f"asked    {steered.question}")
            say(f"answers  {_one_line(steered.before)}")
            say(f"steered  {_one_line(steered.after)}   (feature {steered.feature}, strength {steered.strength:.1f})")
    _farewell(run, console)


def _farewell(run: Path, console: Console) -> None:
    console.print("\n[bold]Where it lies[/]")
    for what, where in (("release", "release"), ("card", "release/README.md"), ("plots", "release/plots")):
        console.print(f"  {what:<8} {run / where}", markup=False, highlight=False)
    console.print("\n[bold]The same with your own SAEs[/]")
    for line in (
        "hubsae show   my_saes/                                   # how each file is read, what is unknown",
        "hubsae push   my_saes/ --base-model ORG/MODEL --dry-run   # the plan; without --dry-run it publishes",
        "python -c 'from hubsae import HubSAE; print(HubSAE.from_pretrained(\"YOU/my_saes\", layer=12))'",
    ):
        console.print(f"  {line}", markup=False, highlight=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
