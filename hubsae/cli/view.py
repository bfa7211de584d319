"""hubsae view: look at the features of a release in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out
from hubsae.core.errors import HubSAEError

PANEL = "Publish and load"


def command(
    source: Annotated[
        str, typer.Argument(metavar="RELEASE", help="A release folder with a reverse index, or OWNER/NAME[@revision].")
    ],
    sae: Annotated[str | None, typer.Argument(help="Id of the SAE to open; the first if left out.")] = None,
    feature: Annotated[int | None, typer.Argument(help="Number of the feature to open.", min=0)] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Write index.html into the release folder, for any file server, and stop.")
    ] = False,
    space: Annotated[
        str | None, typer.Option(help="Publish the pages as this static Space, OWNER/NAME, and stop.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(help="Repo that the pages tell people to load from.", show_default="the source")
    ] = None,
    private: options.Visibility = None,
    allow_secrets: options.AllowSecrets = False,
    port: options.Port = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the browser.")] = True,
) -> None:
    """Show what the features of a release fire on: a table of all of them and a page for each.

    The pages are one HTML file that reads the release's Parquet tables; nothing leaves this machine.
    """
    from hubsae.index import page

    local = Path(source).is_dir()
    if not local and (build or source.count("/") != 1):
        raise HubSAEError(f"{source} is not a folder" + ("" if build else " and not OWNER/NAME"))
    if local:
        release = Path(source)
    else:
        from hubsae.hub.pages import fetch

        release = fetch(source, notify=lambda line: err().print(line, style="dim", markup=False))
        repo = repo or source.split("@")[0]
    if space is not None:
        from hubsae.hub.pages import publish_space

        if repo is None:
            raise HubSAEError("--space needs to know where the SAEs are", hint="name the repo: --repo OWNER/NAME")
        done = publish_space(release, space, repo=repo, private=private, allow_secrets=allow_secrets)
        out().print(f"{'published' if done.committed else 'unchanged'}: {done.url}", markup=False)
        return
    if build:
        out().print(str(page.build(release, repo=repo)), markup=False)
        return
    found = page.indexes(release)
    if not found:
        raise HubSAEError(f"{source} has no reverse index", hint=f"make one: hubsae index {source} --activations ACTS")
    _serve(release, repo, _place(found, sae, feature), port, browser)


def _place(found: list[dict], sae: str | None, feature: int | None) -> str:
    """The part of the address behind `#`."""
    from urllib.parse import quote

    if sae is None and feature is None:
        return ""
    ids = [line["id"] for line in found]
    if sae is not None and sae not in ids:
        raise HubSAEError(f"no index of {sae!r} here", hint=f"there are: {', '.join(ids[:20])}")
    wanted = sae or ids[0]
    return f"#/sae/{quote(wanted, safe='')}" + ("" if feature is None else f"/feature/{feature}")


def _serve(release: Path, repo: str | None, place: str, port: int, browser: bool) -> None:
    import threading
    import webbrowser

    from hubsae.index.serve import serve

    with serve(release, port=port, repo=repo) as url:
        out().print(f"{url}/{place}", markup=False, soft_wrap=True)
        err().print("Ctrl-C stops.", style="dim")
        if browser:
            webbrowser.open(f"{url}/{place}")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
