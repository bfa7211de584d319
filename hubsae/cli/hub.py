"""`hubsae hub`: run a Hub server on this machine, and make it fail on purpose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import err, out
from hubsae.core.errors import HubSAEError
from hubsae.core.options import pass_on
from hubsae.core.progress import say

if TYPE_CHECKING:
    from hubsae.localhub import LocalHub, Token

PANEL = "Tools"

app = typer.Typer(no_args_is_help=True, help="Run a local Hub server; stock clients push to it and load from it.")


@app.command()
def serve(
    root: Annotated[Path, typer.Option(help="Data folder; made if it is not there.")],
    port: options.Port = 8642,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Only this machine can reach the default.")
    ] = "127.0.0.1",
    token: Annotated[
        list[str] | None, typer.Option(help="A user and their token, NAME=TOKEN (or NAME=TOKEN:read). Repeatable.")
    ] = None,
    org: Annotated[
        list[str] | None,
        typer.Option(help="An organisation, ORG=alice,bob:read. ORG!private=... makes its repos private."),
    ] = None,
    xet: Annotated[bool, typer.Option("--xet/--no-xet", help="Offer Xet storage. Without it clients need LFS.")] = True,
    cdn: Annotated[
        bool, typer.Option("--cdn", help="Redirect large files to a second port, as the Hub to its CDN.")
    ] = False,
    multipart_threshold: Annotated[
        int, typer.Option(help="LFS uploads above this many bytes come in parts.", min=1)
    ] = 2**29,
    page_size: Annotated[int, typer.Option(help="Entries per page of a file listing.", min=1)] = 1000,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="Fail on purpose: METHOD:PATTERN:STATUS|drop|lost[:COUNT], as POST:/commit/:503:2. Repeatable."
        ),
    ] = None,
    world: Annotated[
        str | None, typer.Option(help="Serve a world, too: its model, chats, problems and texts (small or tiny).")
    ] = None,
    fsync: Annotated[
        bool, typer.Option("--fsync/--no-fsync", help="Survive power loss, not only a killed process.")
    ] = True,
) -> None:
    """Serve until stopped with Ctrl-C.

    Without --token there is one user `local`, whose token is kept in the data folder.
    """
    from hubsae.core.extras import require

    require("uvicorn", extra="hub")
    require("starlette", extra="hub")
    from hubsae.localhub import Fault, LocalHub, LocalHubError, Org, Settings, Token

    try:
        tokens = tuple(Token.parse(text) for text in token or ()) or (_kept_token(root),)
        members = {token.user: "admin" for token in tokens if token.role == "write"}
        # the ids of a world say `local/...`, whoever runs the server
        homes = (Org("local", members),) if world and "local" not in members else ()
        orgs = tuple(Org.parse(text) for text in org or ()) + homes
        settings = pass_on(Settings, locals(), faults=tuple(Fault.parse(text) for text in fault or ()))
        hub = LocalHub(settings)
    except LocalHubError as why:
        raise HubSAEError(str(why)) from why
    if world:
        _serve_world(world, hub)
    console = err()
    console.print(f"Serving {hub.root} at {hub.url} (Ctrl-C stops). In another shell:")
    console.print(f"  export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token}", markup=False)
    if not xet:
        console.print("  export HF_HUB_DISABLE_XET=1")
    if host not in ("127.0.0.1", "localhost", "::1"):
        console.print("Reachable from the network over plain HTTP: use it only where you trust everyone on it.")
    hub.serve_forever()


def _serve_world(name: str, hub: LocalHub) -> None:
    """Make the world, and upload it from beside the server as soon as that answers."""
    import threading
    import time
    from urllib.error import URLError
    from urllib.request import ProxyHandler, build_opener

    from hubsae.cli.world import repos_of
    from hubsae.hub.mirror import mirror_folders

    repos = repos_of(name)

    def upload() -> None:
        for _ in range(600):
            try:
                build_opener(ProxyHandler({})).open(hub.url, timeout=10).close()
                break
            except URLError:
                time.sleep(0.1)
        mirror_folders(repos, hub.url, hub.token, notify=say)

    threading.Thread(target=upload, name="hubsae-world", daemon=True).start()


def _kept_token(root: Path) -> Token:
    """The token of the user `local`, made on the first start and readable only by its owner."""
    import secrets

    from hubsae.localhub import Token

    path = root / "token"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as handle:
            handle.write(f"hf_{secrets.token_hex(16)}\n")
    return Token("local", path.read_text().strip())


@app.command()
def fault(
    rule: Annotated[str, typer.Argument(help="METHOD:PATTERN:STATUS|drop|lost[:COUNT], or `clear`.")],
    root: Annotated[Path, typer.Option(help="Data folder of the running server (it holds the admin token).")],
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8642",
) -> None:
    """Make a running server fail on purpose, or stop it doing so (`clear`)."""
    import json
    from urllib.error import URLError
    from urllib.request import ProxyHandler, Request, build_opener

    from hubsae.localhub import Fault, LocalHubError

    try:
        admin = json.loads((root / "hub.json").read_text())["admin_token"]
        headers = {"Authorization": f"Bearer {admin}", "Content-Type": "application/json"}
        request = Request(f"{url}/_local/faults", method="DELETE", headers=headers)
        if rule != "clear":
            wanted = Fault.parse(rule)
            body = {name: getattr(wanted, name) for name in ("path", "method", "status", "drop", "count")}
            request = Request(f"{url}/_local/faults", method="POST", headers=headers, data=json.dumps(body).encode())
        build_opener(ProxyHandler({})).open(request, timeout=10).read()
    except (LocalHubError, FileNotFoundError, URLError) as why:
        raise HubSAEError(f"fault not set: {why}", hint="is the server running, with this --root and --url?") from why
    out().print("faults cleared" if rule == "clear" else f"fault set: {rule}", markup=False)
