"""The notebooks run from start to end, and the files in the repository are the ones the script makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "notebooks"
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")


def build():
    spec = importlib.util.spec_from_file_location("notebooks_build", ROOT / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["publish_and_load", "in_a_model"])
@pytest.mark.parametrize("world", ["tiny", pytest.param("real", marks=pytest.mark.slow)])
def test_a_notebook_runs(name: str, world: str, cache_root: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sae_lens")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    module = build()
    if world == "tiny":  # as where the packages of the real model are missing
        monkeypatch.setenv("HUBSAE_HOME", str(cache_root))
        cells = module.NOTEBOOKS[name]
        module.NOTEBOOKS[name] = [cell.replace("if available() else", "if False else") for cell in cells]
    node = module.execute(name)
    printed = "".join(o.get("text", "") for c in node.cells if c.cell_type == "code" for o in c.outputs)
    assert "False" not in printed.replace("committed again: False", "")


@pytest.mark.parametrize("name", ["publish_and_load", "in_a_model"])
def test_the_committed_notebook_is_current_and_executed(name: str):
    kept = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    fresh = build().notebook(name)
    assert [c.source for c in kept.cells] == [c.source for c in fresh.cells], "run: python notebooks/build.py"
    assert any(c.outputs for c in kept.cells if c.cell_type == "code")
