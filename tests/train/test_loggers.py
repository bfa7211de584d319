"""The other loggers: the same lines as the log file, through the real packages where they are installed."""

import json
import os
import subprocess
import sys
import types

import pytest

from hubsae.core.errors import MissingExtraError
from hubsae.train import TrainConfig, train
from hubsae.train.log import Log

SETTINGS = {"d_sae": 32, "k": 4, "batch_size": 128, "lr": 2e-3, "epochs": 1, "log_every": 8, "name": "mine"}


def expected(folder):
    """(step, value) of the training loss, as log.jsonl has it."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], pytest.approx(line["loss"])) for line in lines if line["event"] == "train"]


@pytest.fixture
def recorded(monkeypatch):
    """A stand-in for wandb that keeps what it is called with."""
    calls = []
    fake = types.ModuleType("wandb")
    for name in ("init", "log", "finish"):
        setattr(fake, name, lambda *args, _name=name, **options: calls.append((_name, args, options)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def test_a_logger_gets_every_line_of_the_log(tokens, tmp_path, recorded):
    train(TrainConfig(**SETTINGS, loggers=("wandb",), project_name="ours"), tokens, out=tmp_path)
    [(first, _, options), *middle, (last, _, _)] = recorded
    assert (first, last) == ("init", "finish")
    assert (options["project"], options["name"], options["dir"]) == ("ours", "mine", str(tmp_path))
    assert options["config"]["d_sae"] == 32
    losses = [(o["step"], a[0]["mine/train/loss"]) for _, a, o in middle if "mine/train/loss" in a[0]]
    assert len(losses) == 4 and losses == expected(tmp_path)


def test_a_finished_run_opens_no_logger_again(tokens, tmp_path, recorded):
    config = TrainConfig(**SETTINGS, loggers=("wandb",))
    train(config, tokens, out=tmp_path)
    recorded.clear()
    train(config, tokens, out=tmp_path)
    assert recorded == []


def test_a_run_taken_up_again_begins_with_the_lines_it_kept(tmp_path, recorded):
    config = TrainConfig(**SETTINGS, loggers=("wandb",))
    mark = None
    for resumed in (False, True):
        log = Log(tmp_path, config)
        log.resume(mark) if resumed else log.fresh()
        for step in (3, 4) if resumed else (1, 2, 3):
            log.add("train", step, "mine", loss=10.0 * step + resumed)
            mark = log.mark() if step == 2 else mark
    starts = [i for i, call in enumerate(recorded) if call[0] == "init"]
    again = [(o["step"], a[0]["mine/train/loss"]) for _, a, o in recorded[starts[1] + 1 :]]
    assert again == [(1, 10.0), (2, 20.0), (3, 31.0), (4, 41.0)]


def test_a_missing_logger_is_named_before_training_begins(tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match="pip install -U trackio"):
        train(TrainConfig(**SETTINGS, loggers=("trackio",)), tokens, out=tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_tensorboard_reads_back_the_log(tokens, tmp_path):
    pytest.importorskip("tensorboard")
    train(TrainConfig(**SETTINGS, loggers=("tensorboard",)), tokens, out=tmp_path)
    assert scalars(tmp_path, "mine/train/loss") == expected(tmp_path)


def test_tensorboard_forgets_what_lies_behind_the_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    config = TrainConfig(**SETTINGS, loggers=("tensorboard",))
    mark = None
    for resumed in (False, True):
        log = Log(tmp_path, config)
        log.resume(mark) if resumed else log.fresh()
        for step in (3, 4) if resumed else (1, 2, 3):
            log.add("train", step, "mine", loss=10.0 * step + resumed)
            mark = log.mark() if step == 2 else mark
        log.close()
    assert scalars(tmp_path, "mine/train/loss") == [(1, 10.0), (2, 20.0), (3, 31.0), (4, 41.0)]


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


RUN = """
import json, sys
import torch
from hubsae.train import TrainConfig, train

settings, folder = json.loads(sys.argv[1]), sys.argv[2]
x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
train(TrainConfig(**settings), x, out=folder)
"""

TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage

[run] = SQLiteStorage.get_runs("ours")
rows = SQLiteStorage.get_logs("ours", run)
print(json.dumps([[row["step"], row["mine/train/loss"]] for row in rows if "mine/train/loss" in row]))
"""

# wandb has no public reader. Its file is LevelDB's log: blocks of records, each crc, length, type and part of a message
WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

[path] = Path(sys.argv[1]).glob("wandb/offline-run-*/run-*.wandb")
data, at, message, found = path.read_bytes(), 7, b"", []
while at < len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    length, kind = struct.unpack_from("<HB", data, at + 4)
    message += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or the last part
        items = Record.FromString(message).history.item
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        if "mine/train/loss" in row:
            found.append([row["_step"], row["mine/train/loss"]])
        message = b""
print(json.dumps(found))
"""


@pytest.mark.parametrize(("kind", "read"), [("trackio", TRACKIO), ("wandb", WANDB)])
def test_a_tracker_reads_back_the_log(kind, read, tmp_path):
    pytest.importorskip(kind)
    folder = tmp_path / "run"
    # both read their settings when imported and leave threads behind, hence processes of their own
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
    }
    settings = json.dumps({**SETTINGS, "loggers": [kind], "project_name": "ours"})

    def run(code, *arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
            timeout=240,
        ).stdout

    run(RUN, settings, str(folder))
    assert [tuple(pair) for pair in json.loads(run(read, str(folder)).splitlines()[-1])] == expected(folder)
    assert not (tmp_path / "wandb").exists()
