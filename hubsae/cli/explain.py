"""hubsae explain: let a chat model name features, and score the names."""

from __future__ import annotations

from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import confirm, err, out, print_json
from hubsae.core.errors import HubSAEError

PANEL = "Train and measure"


def command(
    release: options.IndexedRelease,
    sae: options.Sae = None,
    model: Annotated[
        str, typer.Option(help="The chat model: its name on the server, or a model of transformers.")
    ] = "",
    server: Annotated[
        str | None, typer.Option(help="OpenAI-compatible address, such as http://127.0.0.1:8000/v1.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.")] = None,
    features: Annotated[str | None, typer.Option(help="Numbers, comma-separated.", show_default="at random")] = None,
    count: Annotated[int, typer.Option(help="How many, when drawn at random.", min=1)] = 100,
    shown: Annotated[int, typer.Option(help="Contexts that the label is made from.", min=1)] = 10,
    judged: Annotated[int, typer.Option(help="Contexts with the feature to judge, and as many without.", min=2)] = 10,
    seed: Annotated[int, typer.Option(help="Of every choice at random.")] = 0,
    yes: options.Yes = False,
    json: options.Json = False,
) -> None:
    """Label features with a chat model and score the labels by detection and fuzzing, beside a control.

    Runs on behind the last finished feature when started again. Labels go to labels.parquet and the feature pages.
    """
    from hubsae.index import explain
    from hubsae.index.chat import LocalChat, ServerChat
    from hubsae.index.features import FeatureIndex

    if not model:
        raise HubSAEError("which chat model?", hint="--model NAME, with --server URL unless transformers loads it")
    index = FeatureIndex.open(release, sae).folder
    settings = explain.Options(shown, judged, seed)
    try:
        numbers = None if features is None else [int(word) for word in features.split(",")]
    except ValueError:
        raise HubSAEError(f"--features {features!r} are not numbers") from None
    wanted = explain.plan(index, numbers, count=count, options=settings)
    question = (
        f"{len(wanted.features)} features: at most {wanted.calls:,} questions to {model}, about "
        f"{wanted.characters / 4 / 1000:,.0f} thousand tokens. Go on?"
    )
    if yes:
        err().print(question.removesuffix(" Go on?"), markup=False)
    confirm(question, yes=yes)
    chat = ServerChat(server, model, key) if server else LocalChat(model)
    found = explain.explain(index, chat, model, wanted, options=settings)
    scores = explain.summary(found)
    if json:
        print_json({"labels": [{"feature": one.feature, "text": one.text} for one in found], "scores": scores})
        return
    for one in found:
        value = one.detection.value
        out().print(f"{one.feature:>7}  {'–' if value is None else f'{value:.2f}'}  {one.text}", markup=False)
    for name, score in scores.items():
        if score["mean"] is not None:
            out().print(
                f"{name.replace('_', ' of ')}: {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}], "
                f"{score['features']} features, {score['judgements']} judgements",
                markup=False,
            )
