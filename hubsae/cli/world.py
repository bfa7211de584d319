"""`hubsae world`: make a model, chats, problems and texts on this machine, or say where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out, print_json
from hubsae.core.errors import NotFoundError, nearest
from hubsae.core.progress import progress

if TYPE_CHECKING:
    from hubsae.recipes.worlds import World

PANEL = "Recipes and demo"
NAMES = {
    "small": "SmolLM2-135M-Instruct, real chats, problems and texts, out of packages",
    "tiny": "a model made on the spot that has learned word problems",
    "quick": "the same, smaller, for tests",
}


def command(
    name: Annotated[str, typer.Argument(help="small, tiny or quick.")] = "small",
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again.")] = False,
    as_json: options.Json = False,
) -> None:
    """Make a world once, under two minutes, and say where its model, chats, problems and texts lie.

    Example: hubsae world small; then hubsae harvest -m MODEL -d CHATS --layers 8,15 --mode prompt+response --out acts
    """
    from hubsae.recipes.worlds import verify as verify_files

    world = open_world(name)
    checked = verify_files(world.folder) if verify else None
    scratch = world.folder.parent / f"{world.folder.name}-rows"
    found = {
        "world": name,
        "id": world.model_id,
        "base_model": world.base_model,
        "folder": str(world.folder),
        "repos": {id_: {"type": kind, "folder": str(path)} for id_, (kind, path) in world.repos(scratch).items()},
        "provenance": world.provenance,
    }
    if as_json:
        print_json(found)
        return
    console = out()
    console.print(f"world {name}: {NAMES[name]}", markup=False)
    for id_, repo in found["repos"].items():
        console.print(f"  {id_} ({repo['type']}): {repo['folder']}", markup=False)
    if checked is not None:
        console.print(f"{checked} files have the sha256 they were made with")
    console.print("serve them by id: hubsae hub serve --root DIR --world " + name, markup=False)


def open_world(name: str) -> World:
    """The world of a name, made where it is not there yet."""

    if name not in NAMES:
        raise NotFoundError(f"no world {name!r}", hint=f"worlds: {nearest(name, NAMES)}")
    from hubsae.recipes.subject import world

    kind, size = ("small", "") if name == "small" else ("tiny", name)
    with progress(f"making the world {name}", unit="steps") as task:
        return world(kind, size=size, progress=lambda done, total, _: task.update(done, total))


def repos_of(name: str) -> dict[str, tuple[str, Path]]:
    """Repositories of a world by id, ready to be served: id -> (type, folder)."""
    world = open_world(name)
    return world.repos(world.folder.parent / f"{world.folder.name}-rows")
