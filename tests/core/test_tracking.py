"""Metrics go to a tracker only where one is there and, if it sends data away, set up by the user."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from hubsae.core.errors import MissingExtraError
from hubsae.core.tracking import Tracker


def test_auto_never_sends_data_away_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if find_spec("trackio") is not None:
        pytest.skip("trackio is installed and keeps its data on this machine")
    with Tracker("auto", tmp_path, name="run") as tracker:
        tracker.log(1, {"reward": 0.5})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_a_tracker_that_is_asked_for_and_missing_is_named(tmp_path):
    with pytest.raises(MissingExtraError, match="trackio"), Tracker("trackio", tmp_path, name="run"):
        pass


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline_keeps_its_files_in_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "rl").mkdir(parents=True)
    with Tracker("auto", tmp_path / "run" / "rl", name="run") as tracker:
        tracker.log(1, {"reward": 0.5})
    assert list((tmp_path / "run/rl/wandb").glob("offline-run-*"))
    assert not (tmp_path / "wandb").exists()
