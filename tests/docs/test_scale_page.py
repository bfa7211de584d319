"""The numbers of docs/scale.md are those that its script computes, and the script cuts work as the code does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("benchmark_scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["benchmark_scale"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_script(scale):
    assert scale.page() in scale.PAGE.read_text(), "python benchmarks/scale.py --write"


def test_parts_are_counted_as_they_are_cut(scale):
    from hubsae.activations.stream import WINDOW
    from hubsae.evals.passes import parts_of

    for tokens in (5_000, 262_145, 280_280_758, 28_028_075_800):
        assert scale.index_parts(tokens) == len(parts_of(SimpleNamespace(n=tokens)))  # type: ignore[arg-type]
    assert scale.SEED.window == WINDOW


def test_a_fleet_is_never_faster_than_its_share_and_the_disk_it_shares(scale):
    for stage in scale.stages(scale.SEED):
        one, many = (scale.simulate(stage, gpus)[0] for gpus in (1, 64))
        assert many <= one
        assert many * 3600 >= stage.disk_bytes / scale.cost("disk")
        assert many * 3600 >= max(stage.seconds().values()) / 64
    slow = scale.Stage("s", gpu_seconds=36_000, parts=10)
    assert scale.simulate(slow, 64)[0] > 1  # ten parts keep ten machines busy
