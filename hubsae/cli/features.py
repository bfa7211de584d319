"""`hubsae features`: look at the features of an SAE in the terminal, by number, by search, or on a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out, print_json, print_table
from hubsae.core.errors import NotFoundError
from hubsae.core.text import printable

if TYPE_CHECKING:
    from hubsae.index.features import Example, Feature, FeatureIndex

PANEL = "Train and measure"


def command(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="A release with an index, or the folder of one.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SAE] [FEATURE]", help="Which SAE, and which of its features.")
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", "-s", help="Features whose contexts, label or logits hold a text.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Run the model on a text: the features of each token.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model for --prompt; otherwise that of the index.")
    ] = None,
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, help="How many examples, or features of a token.")
    ] = 5,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Show what features fire on, what they promote, and what stands near them.

    hubsae features release/                        # the features that can be named best
    hubsae features release/ layers.15 123
    hubsae features release/ layers.15 --search thank
    hubsae features release/ layers.15 --prompt "Gravity is a force" --model M
    """
    from hubsae.hub.pages import open_index

    words = list(names or [])
    feature = int(words.pop()) if words and words[-1].isdigit() else None
    if len(words) > 1:
        raise typer.BadParameter(f"{' '.join(words)}: give one SAE, and the number of a feature")
    index = open_index(release, words[0] if words else None)
    if prompt is not None:
        rows = _on_prompt(release, index, prompt, model, number)
        print_json(rows) if as_json else _show_prompt(index, rows)
    elif search is not None:
        found = index.search(search)
        shown = [{"feature": f, "found": where} for f, where in found]
        print_json(shown) if as_json else _show_found(index, shown, search)
    elif feature is not None:
        one = index[feature]
        print_json(one.to_dict()) if as_json else _show(one, number)
    else:
        rows = _overview(index, 20)
        print_json(rows) if as_json else _show_overview(index, rows)


def _text(example: Example) -> Any:
    """A context as rich text: the stronger a token, the stronger its colour. Its letters are only letters."""
    from rich.text import Text

    most = max(example.values, default=0) or 1
    shown = Text(f"{example.value:9.3g}  ", style="dim")
    for place, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
        share = max(value, 0) / most
        style = "bold black on orange1" if place == example.center else "black on wheat1" if share > 0.3 else ""
        style = style or ("orange1" if share > 0 else "")
        shown.append(printable(token.replace("\n", "↵")), style)
    return shown


def _show(feature: Feature, number: int) -> None:
    console = out()
    labels = "; ".join(printable(label["text"]) for label in feature.labels)
    console.print(f"feature {feature.number}{f': {labels}' if labels else ''}", style="bold", markup=False)
    shares = [
        f"{100 * share:.0f} % {what}"
        for share, what in ((feature.position_0_share, "at position 0"), (feature.special_share, "on special tokens"))
        if share is not None
    ]
    purity = "" if feature.purity is None else f", purity {feature.purity:.2f}"
    line = ", ".join([f"fires on {feature.count:,} tokens (density {feature.density:.3g})", *shares])
    console.print(f"{line}; largest {feature.max:.4g}, mean {feature.mean:.4g}{purity}", markup=False)
    for title, examples in (("strongest prompts", feature.prompts), ("at random", feature.samples)):
        if examples:
            console.print(f"\n{title}", style="bold")
        for example in examples[:number]:
            console.print(_text(example))
    for title, pairs in (("promotes", feature.top_logits), ("suppresses", feature.bottom_logits)):
        if pairs:
            console.print(f"\n{title}: " + ", ".join(printable(repr(token)) for token, _ in pairs), markup=False)
    for title, near in (("nearest decoder rows", feature.neighbours), ("fires with", feature.cofiring)):
        if near:
            console.print(f"{title}: " + ", ".join(f"{other} ({value:.2f})" for other, value in near), markup=False)
    if feature.count:
        console.print(
            f"\nto steer: sae.steer(model, feature={feature.number}, strength={feature.strength:.3g}, unit=False) adds "
            "what it adds at its strongest",
            style="dim", markup=False,
        )  # fmt: skip


def _overview(index: FeatureIndex, most: int) -> list[dict[str, Any]]:
    """Features that fire neither on nearly nothing nor on nearly everything, the purest first."""
    columns = ("feature", "count", "density", "max", "purity", "top_token")
    rows = index.metrics.select(columns).take(index.readable()).to_pylist()
    rows.sort(key=lambda r: (-(r["purity"] or 0), -r["count"]))
    return rows[:most]


def _show_overview(index: FeatureIndex, rows: list[dict[str, Any]]) -> None:
    s = index.summary
    names = index.names([r["feature"] for r in rows])
    fire = f"{s['n_active']:,} of {len(index):,} features fire on {s['n_tokens']:,} tokens"
    title = f"{s['sae'].get('id')}: {fire} (scope: {s['scope']})"
    table = [[r["feature"], r["density"], r["max"], r["purity"], printable(names[r["feature"]], 60)] for r in rows]
    print_table(title, ["feature", "density", "largest", "purity", "fires on"], table)


def _show_found(index: FeatureIndex, rows: list[dict[str, Any]], text: str) -> None:
    if not rows:
        err().print(f"no feature has {text!r} in its contexts, label or logits", markup=False)
        return
    names = index.names([r["feature"] for r in rows])
    table = [[r["feature"], printable(names[r["feature"]], 40), printable(r["found"], 90)] for r in rows]
    print_table("", ["feature", "fires on", "found"], table)


def _on_prompt(release: str, index: FeatureIndex, prompt: str, model: str | None, number: int) -> list[dict[str, Any]]:
    import torch

    from hubsae.activations.models import load_model, load_tokenizer
    from hubsae.core.intervene import attach
    from hubsae.evals.groups import token_texts
    from hubsae.hub.sae import HubSAE

    said = index.summary
    sae = HubSAE.from_pretrained(release, said["sae"]["id"])
    name = model or said["tokenizer"]["id"] or sae.metadata.base_model.id
    if name is None:
        raise NotFoundError("the index names no model", hint="pass --model")
    tokenizer, loaded = load_tokenizer(name), load_model(name)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad(), attach(sae, loaded) as seen:
        loaded(input_ids=ids)
    codes = seen.all[0]
    rows = []
    for place, text in enumerate(token_texts(tokenizer, ids[0].tolist())):
        values, features = codes.values[0, place], codes.indices[0, place]
        best = values.topk(min(number, len(values)))
        pairs = zip(features[best.indices].tolist(), best.values.tolist(), strict=True)
        rows.append({"token": text, "features": [{"feature": f, "value": v} for f, v in pairs if v > 0]})
    return rows


def _show_prompt(index: FeatureIndex, rows: list[dict[str, Any]]) -> None:
    names = index.names(sorted({f["feature"] for r in rows for f in r["features"]}))
    table = []
    for row in rows:
        token = printable(row["token"].replace("\n", "↵"))
        for number, f in enumerate(row["features"]):
            table.append(["" if number else token, f["feature"], f["value"], printable(names[f["feature"]], 60)])
    print_table("", ["token", "feature", "value", "fires on"], table)
