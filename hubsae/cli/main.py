"""Entry point: finds the verbs, runs one, turns errors into one readable message and an exit code.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

import hubsae.cli
from hubsae.core.errors import HubSAEError, TrainingInterrupted

# typer used to build on click and now carries its own copy; either way this is the base of usage errors
USAGE_ERROR: type[Any] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

STOPPED = 130

PANELS = ("Publish and load", "Activations", "Train and measure", "Recipes and demo", "Tools")

app = typer.Typer(
    name="hubsae",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from hubsae.version import __version__

        typer.echo(f"hubsae {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Publish and load sparse autoencoders on the Hugging Face Hub."""
    if debug:
        os.environ["HUBSAE_DEBUG"] = "1"


def verbs() -> list[str]:
    """Module names of the verbs, in the order of their panels."""
    return sorted(name for _, name, _ in pkgutil.iter_modules(hubsae.cli.__path__) if name != "main" and name[0] != "_")


def build() -> typer.Typer:
    """The application with every verb registered."""
    modules = [(name, import_module(f"hubsae.cli.{name}")) for name in verbs()]
    modules.sort(key=lambda item: (PANELS.index(item[1].PANEL), item[0]))
    for name, module in modules:
        verb = name.replace("_", "-")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb, rich_help_panel=module.PANEL)
        else:
            settings = getattr(module, "CONTEXT", None)
            app.command(verb, rich_help_panel=module.PANEL, context_settings=settings)(module.command)
    return app


def main() -> None:
    """Run the command line."""
    debug = "--debug" in sys.argv or bool(os.environ.get("HUBSAE_DEBUG"))
    # `--debug` is accepted anywhere, because it is remembered only after something failed
    if "--debug" in sys.argv[2:]:
        sys.argv = [sys.argv[0], "--debug", *(arg for arg in sys.argv[1:] if arg != "--debug")]
    try:
        code = build()(standalone_mode=False)
        if code == STOPPED:  # typer turns Ctrl-C into this code and says nothing
            _say("stopped")
    except typer.Abort:
        _say("stopped")
        code = STOPPED
    except USAGE_ERROR as error:  # pyright: ignore[reportGeneralTypeIssues]
        error.show()
        code = error.exit_code
    except KeyboardInterrupt:
        _say("stopped")
        code = STOPPED
    except BrokenPipeError:
        # the reader went away (`hubsae ls | head`): nothing is wrong, but flushing again would raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except TrainingInterrupted as error:
        _say(f"stopped: {error}")
        code = STOPPED
    except HubSAEError as error:
        if debug:
            raise
        _say(f"error: {error}")
        code = 1
    except OSError as error:
        if debug:
            raise
        _say(f"error: {error.strerror or error}: {error.filename}" if error.filename else f"error: {error}")
        code = 1
    except Exception as error:
        if debug:
            raise
        _say(f"error: {type(error).__name__}: {error}\n  -> this is not an error hubsae knows; --debug shows where")
        code = 1
    if code == STOPPED:
        # Ctrl-C that arrives inside an `exec` (a dataclass being made while a package is imported) leaves CPython with
        # a flag by which `python -m` ends itself with the signal whatever the code; running anything takes it back
        exec("")
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str) -> None:
    from hubsae.core.text import printable

    sys.stderr.write("\n".join(printable(line) for line in text.split("\n")) + "\n")


if __name__ == "__main__":
    main()
