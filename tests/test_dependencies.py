"""hubsae declares what it imports, and its floors are versions it runs with."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PEERS = {"triton"}
"""Comes with torch where it runs."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", name).group()).lower()  # type: ignore[union-attr]


def imported() -> dict[str, Path]:
    """Top-level packages that the code imports, at any depth, and a file that does."""
    found: dict[str, Path] = {}
    for folder in (ROOT / "hubsae", ROOT / "recipes"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    names = [node.module]
                elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("require", "import_module"):
                    names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and arg.value]
                found.update({str(name).partition(".")[0]: path for name in names})
    return found


def test_every_import_is_declared():
    declared = {normal(name) for name in PROJECT["dependencies"]}
    for extra in PROJECT["optional-dependencies"].values():
        declared |= {normal(name) for name in extra}
    homes = packages_distributions()
    ours = {"hubsae", "recipes", "", *sys.stdlib_module_names}
    missing = {}
    for name, path in imported().items():
        if name in ours or name in PEERS:
            continue
        providers = {normal(home) for home in homes.get(name, [name])}
        if not providers & declared:
            missing[name] = str(path.relative_to(ROOT))
    assert not missing
