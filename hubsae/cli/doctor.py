"""`hubsae doctor`: is everything here that publishing, loading and training need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hubsae.cli import _options as options
from hubsae.cli._common import out

if TYPE_CHECKING:
    from hubsae.hub.health import Check

PANEL = "Tools"

# the packages each extra stands for
EXTRAS = {
    "train": ("transformers", "datasets", "accelerate", "peft", "trl", "pyarrow", "scipy"),
    "saelens": ("sae-lens",),
    "hub": ("starlette", "uvicorn", "pathspec", "lz4", "blake3", "markdown-it-py"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "plots": ("matplotlib",),
}
CORE = ("torch", "safetensors", "numpy", "huggingface_hub", "pydantic")


def command(
    offline: Annotated[bool, typer.Option("--offline", help="Ask no Hub; look at this machine only.")] = False,
    as_json: options.Json = False,
) -> None:
    """Check versions, extras, endpoint, token, cache, Xet and device; say what to do about each finding."""
    from hubsae.hub.health import hub_checks

    checks = [*_versions(), *_extras(), _device(), *([] if offline else hub_checks())]
    if as_json:
        from hubsae.cli._common import print_json

        print_json([check._asdict() for check in checks])
    else:
        _show(checks)
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


def _versions() -> list[Check]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from hubsae.hub.health import Check
    from hubsae.version import __version__

    checks = [Check("hubsae", "ok", f"{__version__} on Python {platform.python_version()}, {platform.system()}")]
    for package in CORE:
        try:
            checks.append(Check(package, "ok", version(package)))
        except PackageNotFoundError:
            checks.append(Check(package, "problem", "missing", "pip install --force-reinstall hubsae"))
    return checks


def _extras() -> list[Check]:
    from importlib.metadata import PackageNotFoundError, version

    from hubsae.hub.health import Check

    checks = []
    for extra, packages in EXTRAS.items():
        found, missing = [], []
        for package in packages:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                missing.append(package)
        if missing:
            checks.append(
                Check(f"[{extra}]", "note", "missing: " + ", ".join(missing), f"pip install 'hubsae[{extra}]'")
            )
        else:
            checks.append(Check(f"[{extra}]", "ok", ", ".join(found)))
    return checks


def _device() -> Check:
    import torch

    from hubsae.hub.health import Check

    if torch.cuda.is_available():
        return Check("device", "ok", f"cuda: {torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} in all")
    if torch.backends.mps.is_available():
        return Check("device", "ok", "mps")
    return Check("device", "ok", f"cpu, {torch.get_num_threads()} threads")


def _show(checks: list[Check]) -> None:
    console = out()
    marks = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "problem": "[red]problem[/]"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        name = check.name.replace("[", r"\[").ljust(width + (1 if check.name.startswith("[") else 0))
        console.print(f"{marks[check.state]}  {name}  {check.found}", highlight=False)
        if check.do:
            console.print(f"         {' ' * width}  [dim]->[/] {check.do}".replace("hubsae[", r"hubsae\["))
