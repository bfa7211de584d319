"""The house stays a house: imports point downwards, the start is light, every public name shows an example."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hubsae

sys.path.insert(0, str(Path(__file__).parent))
from imports import circles, import_graph, upward

ROOT = Path(hubsae.__file__).parent
ROOMS = ["cli", "recipes", "scale", "rl", "hub", "index", "train", "evals", "activations", "formats", "core", "kernels"]
HEAVY = {
    "transformers", "datasets", "trl", "peft", "accelerate", "sae_lens", "onnx", "onnxruntime", "matplotlib",
    "numba", "scipy", "pyarrow", "datatrove", "ray", "pandas", "polars", "sparsify", "dictionary_learning",
}  # fmt: skip


def top_level_imports(path: Path) -> set[str]:
    """Modules imported when the file is imported: not inside functions, not under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(nodes) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(path.read_text()).body)
    return found


FILES = sorted(p for p in ROOT.rglob("*.py") if "_data" not in p.parts)
RECIPES = sorted((ROOT.parent / "recipes").glob("*/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_nothing_heavy_and_only_hub_talks_to_the_hub(path):
    room = path.relative_to(ROOT).parts[0]
    for module in top_level_imports(path):
        parts = module.split(".")
        if room == "localhub":
            assert parts[0] != "hubsae" or parts[1:2] == ["localhub"], f"{path.name} imports {module}"
        assert room == "hub" or parts[0] != "huggingface_hub", f"only hub talks to the Hub; {path} imports {module}"
        if room != "localhub":
            assert parts[0] not in HEAVY, f"{path} imports {module} when it is imported itself"


def test_a_room_imports_only_rooms_below_it_at_any_depth():
    assert upward(import_graph(ROOT), ROOMS) == []


def test_no_imports_go_in_a_circle_at_any_depth():
    assert circles(import_graph(ROOT)) == []


def test_a_planted_circle_and_a_planted_upward_import_are_found(tmp_path):
    root = tmp_path / "hubsae"
    planted = {
        "core/a.py": "def late():\n    from hubsae.core import b\n",
        "core/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hubsae.core.c import C\n",
        "core/c.py": "import hubsae.core.a\n",
        "core/d.py": "from hubsae.core.a import late\n",
        "formats/e.py": "class E:\n    def push(self):\n        from hubsae.hub.f import push\n",
        "hub/f.py": "import json\n",
    }
    for name, text in planted.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    graph = import_graph(root)
    assert circles(graph) == [["hubsae.core.a", "hubsae.core.b", "hubsae.core.c"]]
    assert upward(graph, ROOMS) == ["hubsae.formats.e imports hubsae.hub.f"]


@pytest.mark.parametrize("path", [*FILES, *RECIPES], ids=lambda p: str(p.relative_to(ROOT.parent)))
def test_a_file_says_what_it_is_for(path):
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), f"{path} has no first line"


@pytest.mark.parametrize("path", [p for p in RECIPES if p.name == "recipe.py"], ids=lambda p: p.parent.name)
def test_a_recipe_is_read_at_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 250, f"{path}: what is a unit of its own gets a file beside it"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_hubsae_or_the_command_line_brings_no_torch():
    for code in ("import hubsae", "from hubsae.cli.main import build; build()"):
        loaded = run(f"import sys; {code}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))").split()
        assert not {"torch", "numpy", "huggingface_hub", "transformers", "pydantic"} & set(loaded), code


def test_importing_the_loader_brings_torch_and_no_peer():
    loaded = run("import sys; from hubsae import HubSAE; print(*{m.partition('.')[0] for m in sys.modules})").split()
    assert not {"sae_lens", "transformers", "datasets", "matplotlib", "pyarrow", "numba"} & set(loaded)


@pytest.mark.parametrize("name", [n for n in hubsae.__all__ if not n.startswith("_")])
def test_every_public_name_has_an_example(name):
    value = getattr(hubsae, name)
    assert ">>>" in (value.__doc__ or ""), f"hubsae.{name} shows no example"


def test_the_examples_in_docstrings_run():
    failed = []
    for path in FILES:
        if path.name == "main.py" or ">>>" not in path.read_text():
            continue
        module = importlib.import_module(".".join(("hubsae", *path.relative_to(ROOT).with_suffix("").parts)))
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        if result.failed:
            failed.append(f"{path.relative_to(ROOT)}: {result.failed} of {result.attempted}")
    assert not failed, failed


def test_the_examples_in_recipes_run():
    from hubsae.recipes.registry import find_recipe

    ran = 0
    for path in RECIPES:
        module = find_recipe(path.parent.name).module(path.stem)
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        assert not result.failed, f"{path}: {result.failed} of {result.attempted}"
        ran += result.attempted
    assert ran > 10
