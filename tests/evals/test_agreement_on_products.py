"""Tasks agree on the backend that multiplies through a file: whoever writes it first decides for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hubsae.core.files import read_json, write_json_atomic
from hubsae.evals import passes
from hubsae.kernels import linear

FIRST, OURS = [[512, 896, 7168, 1, "torch"]], [[512, 896, 7168, 1, "other"]]


@pytest.mark.parametrize("error", [FileExistsError, PermissionError])
def test_who_comes_second_takes_the_decision_of_the_first(tmp_path: Path, monkeypatch: Any, error: type[OSError]):
    path, adopted, scratch = tmp_path / "products.json", [], []

    def decide(_: Any) -> Any:
        write_json_atomic(path, FIRST)  # another task is faster
        return OURS

    def link(mine: Path, _: Path) -> None:
        scratch.append(mine.name)
        raise error

    monkeypatch.setattr(passes, "_product_decisions", decide)
    monkeypatch.setattr(linear, "adopt", adopted.append)
    monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        path.unlink(missing_ok=True)
        passes.agree_on_products({}, path)
    assert adopted == [FIRST, FIRST] and read_json(path) == FIRST
    assert len(set(scratch)) == 2, "tasks in containers may have one process number"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_who_comes_first_decides(tmp_path: Path, monkeypatch: Any, links: bool):
    path, adopted = tmp_path / "products.json", []

    def no_link(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(passes, "_product_decisions", lambda _: OURS)
    monkeypatch.setattr(linear, "adopt", adopted.append)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    passes.agree_on_products({}, path)
    assert adopted == [OURS] and read_json(path) == OURS and list(tmp_path.iterdir()) == [path]
