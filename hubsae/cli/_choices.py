"""`-s name=value`: choices for the reader of a format, as typed on a command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="NAME=VALUE",
        help="A choice for the reader: k=64, architecture=topk, decode_adds_b_pre=true, transposed=false ...",
    ),
]


def parse_choices(given: list[str] | None) -> dict[str, Any]:
    """`["k=64", "topk_relu=false"]` as values.

    >>> parse_choices(["k=64", "topk_relu=false", "hook=model.layers.3"])
    {'k': 64, 'topk_relu': False, 'hook': 'model.layers.3'}
    """
    out: dict[str, Any] = {}
    for item in given or []:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--set")
        out[name.strip().replace("-", "_")] = _value(text.strip())
    return out


def _value(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "yes", "on"):
        return True
    if lowered in ("false", "no", "off"):
        return False
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
