"""Tasks agree on the backend that multiplies through a folder: whoever renames it into place decides for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hubsae.evals import passes
from hubsae.kernels import linear

FIRST, OURS = [[512, 896, 7168, 1, "torch"]], [[512, 896, 7168, 1, "other"]]


@pytest.fixture
def adopted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What tasks adopt; the first one to try decides OURS, the next FIRST."""
    found, tried = [], iter([OURS, FIRST])
    monkeypatch.setattr(passes, "_product_decisions", lambda _: next(tried))
    monkeypatch.setattr(linear, "adopt", found.append)
    return found


def test_who_comes_first_decides_for_all(tmp_path: Path, adopted: list[Any]):
    for _ in range(2):
        passes.agree_on_products({}, tmp_path / "job" / "products")
    assert adopted == [OURS, OURS]
    assert list((tmp_path / "job").iterdir()) == [tmp_path / "job" / "products"]


def test_tasks_that_come_at_one_instant_adopt_the_same_on_a_disk_without_links(
    tmp_path: Path, adopted: list[Any], monkeypatch: pytest.MonkeyPatch
):
    place, scratch = tmp_path / "products", []

    def no_link(*_: Any) -> None:
        raise PermissionError

    def meanwhile(move: Any) -> Any:
        def moved(source: Any, target: Any) -> None:
            if Path(target) == place:
                scratch.append(Path(source).name)
                if len(scratch) == 1:  # another task does the whole of it between the look and the renaming
                    passes.agree_on_products({}, place)
            move(source, target)

        return moved

    monkeypatch.setattr(os, "link", no_link)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, meanwhile(getattr(os, name)))
    passes.agree_on_products({}, place)
    assert adopted == [FIRST, FIRST]
    assert len(set(scratch)) == 2, "tasks in containers may have one process number"
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, adopted: list[Any], monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        passes.agree_on_products({}, tmp_path / "products")
    assert not adopted and not list(tmp_path.iterdir())
