"""`hubsae demo`: the whole journey on this machine, offline: train, measure, publish, load back, steer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli._common import out
from hubsae.core.errors import HubSAEError, TrainingInterrupted

if TYPE_CHECKING:
    from hubsae.recipes.registry import PreparedRun
    from hubsae.recipes.run import StepEvent

PANEL = "Recipes and demo"

LOOK = {
    "subject": (
        "A real instruct model and real conversations, out of packages (SmolLM2-135M-Instruct, ShareGPT)",
        "hubsae world small      # all of the following: hubsae recipe run first_look --profile demo",
    ),
    "activations": (
        "Harvest its residual stream at {layers}",
        "hubsae harvest --model MODEL --dataset chats.jsonl --layers 15 --mode prompt+response --out acts/",
    ),
    "sae": (
        "Train one sparse autoencoder; position 0 is left out by name",
        "hubsae train CONFIG.yaml --exclude position_0",
    ),
    "measure": (
        "Measure it on conversations it never saw, and inside the model",
        "hubsae eval release/ --activations acts/ --by-group\nhubsae eval release/ --model MODEL --texts chats.jsonl",
    ),
    "index": (
        "Find what each feature fires on, and what it promotes",
        "hubsae index release/ --activations acts/ --model MODEL\nhubsae features release/ layer15 123",
    ),
}
CHAIN = {
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
    world: Annotated[
        str | None,
        typer.Option(
            help="small: one SAE of a real instruct model, with its features. tiny: a chain of SAEs along a model that "
            "learns, made on the spot. Default: small where its packages are installed."
        ),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="The tiny world, a smaller model, fewer tokens: under a minute.")
    ] = False,
) -> None:
    """Run the whole journey on this machine, offline: train, measure, publish, load back, steer.

    Run it again and finished steps are skipped; stop it with Ctrl-C and the next run continues.
    """
    from hubsae.recipes.registry import prepare

    world = world or ("tiny" if fast or not _have_small() else "small")
    if world not in ("tiny", "small") or (fast and world == "small"):
        raise HubSAEError(
            f"the demo has no world {world!r} {'that is fast' if fast else ''}".rstrip(), hint="tiny or small"
        )
    profile = "fast" if fast else "demo"
    recipe, variant, titles = ("rl_chain", "strict", CHAIN) if world == "tiny" else ("first_look", None, LOOK)
    folder, lock = _open_folder(keep, profile if world == "tiny" else f"{profile}-{world}")
    with lock:
        announcer = _Announcer(titles)
        prepared = prepare(recipe, profile=profile, variant=variant, out=folder, notify=announcer.announce, show=None)
        layers, stages = _places(prepared)
        announcer.layers = " and ".join(f"layer {layer}" for layer in layers)
        try:
            prepared.execute()
        except (KeyboardInterrupt, TrainingInterrupted):
            _print(f"\nstopped; finished steps are kept in {folder}, the same command continues")
            raise KeyboardInterrupt from None
        _tour(folder, layers[-1], stages[-1] if stages else None)


def _have_small() -> bool:
    """Whether the small world can be had: made before, or made now from its packages."""
    from hubsae.recipes.small import available, small_world

    if not available():
        return False
    try:
        return small_world() is not None
    except HubSAEError as error:
        _print(f"the small world cannot be made here, so the demo takes the tiny one: {error}")
        return False


def _places(prepared: PreparedRun) -> tuple[tuple[int, ...], list[str]]:
    """Layers and stages of the run."""
    config: Any = prepared.config
    if prepared.recipe.name == "first_look":
        return (config.data.layer,), []
    return config.harvest.layers, config.stage_names()


def _open_folder(keep: Path | None, name: str) -> tuple[Path, Any]:
    """The folder asked for, or one of our own in the temporary folder; and the lock that makes it ours."""
    import os
    import tempfile

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


class _Announcer:
    """Announces each group of steps once, and says what came of it."""

    def __init__(self, titles: dict[str, tuple[str, str]]) -> None:
        self.titles = titles
        self.layers = ""
        self.group = ""

    def announce(self, event: StepEvent) -> None:
        group = event.name.partition("/")[0]
        if event.outcome is None and group != self.group and group in self.titles:
            title, typed = self.titles[group]
            _title(title.format(layers=self.layers), typed)
            self.group = group
        elif event.outcome is not None and group in self.titles:
            how = f"{event.outcome.seconds:.0f} s" if event.outcome.ran else "done by an earlier run"
            result = _result_of(group, event.outcome.result)
            _print(f"  {result} ({how})" if result else f"  {how}")


def _result_of(group: str, result: Any) -> str:
    """What came of a step, in a few words; empty where there is nothing to say."""
    if group == "rl":
        return f"{float(result['last']['score_strict']):.0%} of the last answers satisfy it"
    if group == "chains":
        return f"{len(result)} SAEs of layer {result[0]['layer']}"
    if group == "activations" and "tokens" in result:
        return f"{sum(result['tokens'].values()):,} tokens"
    if group == "sae":
        return f"{result['latents']:,} latents, trained on {result['tokens']:,} tokens"
    if group == "measure":
        return (
            f"FVU {result['fvu']:.3f}, {result['frac_recovered_mean']:.1%} of the loss recovered, "
            f"KL {result['kl']:.3f} nats, {result['dead_fraction']:.1%} dead; scope: {result['scope']}"
        )
    if group == "index":
        return f"{result['alive']:,} of {result['features']:,} features fire"
    return ""


def _title(text: str, typed: str = "") -> None:
    out().print(f"\n[bold]{text}[/]")
    for line in typed.splitlines():
        out().print(f"  [dim]$ {line}[/]", highlight=False)


def _print(text: str) -> None:
    out().print(text, markup=False, highlight=False)


def _say(text: str) -> None:
    _print(f"  {text}")


def _tour(run: Path, layer: int, stage: str | None) -> None:
    from hubsae.localhub import running
    from hubsae.recipes import tour

    demo = tour.Demo(run, stage, layer)
    with running(root=run / "hub") as hub:
        _title(
            "Start a Hub on this machine and publish", f"hubsae hub serve --root hub/\nhubsae push {run.name}/release"
        )
        _say(tour.publish(demo, hub, _say))
        which = f'layer={layer}, stage="{stage}"' if stage else f"layer={layer}"
        _title("Load it back", f'HubSAE.from_pretrained("{tour.REPO}", {which})')
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
            if steered.word:
                _say(f"feature {steered.feature} fires on {steered.word!r}")
            _say(f"asked    {steered.question}")
            _say(f"answers  {_one_line(steered.before)}")
            _say(f"steered  {_one_line(steered.after)}   (feature {steered.feature}, strength {steered.strength:.1f})")
    _farewell(run)


def _farewell(run: Path) -> None:
    places = (("release", "release"), ("card", "release/README.md"), ("plots", "release/plots"))
    _title("Where it lies")
    for what, where in (*places, ("report", "report/report.md")):
        if (run / where).exists():
            _say(f"{what:<8} {run / where}")
    if (run / "release" / "index.html").exists():
        _title("Look at the features in a browser", f"hubsae view {run / 'release'}")
    _title("The same with your own SAEs")
    for line in (
        "hubsae show   my_saes/                                   # how each file is read, what is unknown",
        "hubsae push   my_saes/ --base-model ORG/MODEL --dry-run   # the plan; without --dry-run it publishes",
        "python -c 'from hubsae import HubSAE; print(HubSAE.from_pretrained(\"YOU/my_saes\", layer=12))'",
    ):
        _say(line)


def _one_line(text: str) -> str:
    return " ".join(text.split())
