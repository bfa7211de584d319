"""Real data and bad days: samples that cannot be used, kills, damaged files, full disks; and the stream behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hubsae.activations import ActivationDataset, ActivationWriter, harvest
from hubsae.activations.stream import Place, open_stream
from hubsae.core.errors import DataError, FormatError, WriteError

GOOD = {"messages": [{"role": "user", "content": "Ann has 12"}, {"role": "assistant", "content": "apples"}]}
BAD = {
    "ends with a turn of user": {"messages": [*GOOD["messages"], {"role": "user", "content": "and?"}]},
    "is an empty chat": {"messages": []},
    "has a message without text": {"messages": [{"role": "user", "content": None}, *GOOD["messages"][1:]]},
    "has no prompt": {"messages": [{"role": "assistant", "content": "a"}]},
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_a_bad_sample_is_counted_named_and_skipped(tmp_path, tiny_model, tokenizer, capsys, why):
    data = [GOOD, BAD[why], GOOD]
    options = {"tokenizer": tokenizer, "mode": "prompt+response"}
    found = harvest(tiny_model, data, [1], out=tmp_path / "a", **options)["layers.1"]
    assert set(found.columns()["sample_id"].tolist()) == {0, 2}
    said = capsys.readouterr().err
    assert f"1 samples cannot be used and were skipped: 1 {why}" in said and "tokens/s" in said
    assert '"bad": 1' in (tmp_path / "a" / "activations.json").read_text()
    with pytest.raises(DataError, match=f"sample 1 {why}"):
        harvest(tiny_model, data, [1], out=tmp_path / "b", strict=True, **options)


def test_a_refusal_of_the_template_is_a_bad_sample(tmp_path, tiny_model, tokenizer, capsys):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    system = {"messages": [{"role": "system", "content": "x"}, *GOOD["messages"]]}
    harvest(tiny_model, [system, GOOD], [1], out=tmp_path, tokenizer=strict, mode="prompt+response")
    assert "0 is refused by the chat template: no system role" in capsys.readouterr().err


def test_where_no_sample_fits_it_is_the_options_that_are_wrong(tmp_path, tiny_model, tokenizer):
    with pytest.raises(DataError, match="cannot tell which column holds the prompt"):
        harvest(tiny_model, [{"x": "a"}] * 3, [1], out=tmp_path, tokenizer=tokenizer, mode="prompt+response")


def test_a_kill_costs_no_more_than_the_last_seconds(tmp_path, tiny_model, token_data):
    """Nothing but time closes these files; with no time to wait every batch is one."""
    harvest(tiny_model, token_data, [1], out=tmp_path / "a", batch_tokens=256, shard_seconds=0.0, progress=False)
    files = list((tmp_path / "a" / "layers.1").glob("*.parquet"))
    assert len(files) > 10
    harvest(tiny_model, token_data, [1], out=tmp_path / "b", batch_tokens=256, progress=False)
    assert len(list((tmp_path / "b" / "layers.1").glob("*.parquet"))) == 1


def test_the_order_of_rows_does_not_depend_on_the_cut_into_files(tmp_path, tiny_model, token_data):
    options = {"batch_tokens": 256, "dtype": "float32", "progress": False}
    many = harvest(tiny_model, token_data, [1], out=tmp_path / "a", shard_seconds=0.0, **options)["layers.1"]
    one = harvest(tiny_model, token_data, [1], out=tmp_path / "b", shard_seconds=None, **options)["layers.1"]
    assert len(many.sources) > 10 and len(one.sources) == 1
    for shuffle in (False, True):
        rows = {"shuffle": shuffle, "seed": 3, "window_bytes": 64_000}
        pairs = zip(many.batches(100, **rows), one.batches(100, **rows), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from conftest_activations import make_qwen
from hubsae.activations import harvest
import numpy as np
rng = np.random.default_rng(0)
data = [rng.integers(3, 290, 40).tolist() for _ in range(4000)]
harvest(make_qwen(), data, [1, 3], out=sys.argv[1], batch_tokens=400, window=64, shard_seconds=0.05)
"""


def test_sigterm_keeps_what_is_written_like_ctrl_c(tmp_path):
    script = WORKER.format(tests=str(Path(__file__).parent))
    worker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    while worker.poll() is None and len(list(tmp_path.glob("layers.3/*.parquet"))) < 3:
        time.sleep(0.005)
    worker.send_signal(signal.SIGTERM)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode != 0 and "KeyboardInterrupt" in said
    assert not list(tmp_path.glob("layers.*/.*.tmp"))
    rows = [sum(s.n_rows for s in ActivationDataset.open(tmp_path, f"layers.{layer}").sources) for layer in (1, 3)]
    assert rows[0] == rows[1] > 0 and rows[0] % 40 == 0


def test_a_damaged_file_stops_the_resumed_harvest_by_name(tmp_path, tiny_model, token_data):
    options = {"batch_tokens": 256, "shard_seconds": 0.0, "progress": False}
    harvest(tiny_model, token_data, [1], out=tmp_path, **options)
    before = {p.name: p.read_bytes() for p in (tmp_path / "layers.1").glob("*.parquet")}
    path = sorted((tmp_path / "layers.1").glob("*.parquet"))[2]
    rng = np.random.default_rng(0)
    for place in rng.integers(0, path.stat().st_size, 8).tolist():
        damaged = bytearray(before[path.name])
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=path.name):
            harvest(tiny_model, token_data, [1], out=tmp_path, **options)
    path.write_bytes(before[path.name])
    harvest(tiny_model, token_data, [1], out=tmp_path, **options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "layers.1").glob("*.parquet")} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_typed_error_that_names_the_folder(tmp_path):
    writer = ActivationWriter(tmp_path, d=64, config="layers.1", finalize=False)
    writer.write(torch.ones(10, 64), sample_id=0)
    writer.commit()
    writer.write(torch.ones(10, 64), sample_id=1)
    stream = writer._streams["train"]
    stream._flush()
    assert stream.parquet is not None
    stream.parquet.file.flush()
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream.parquet.file.fileno())
    with pytest.raises(WriteError, match=r"layers\.1: No space left(.|\n)*10 rows lie in finished files"):
        writer.write(torch.ones(200_000, 64), sample_id=2)
    writer.abort()
    assert len(ActivationDataset.open(tmp_path)) == 10


@pytest.mark.parametrize("options", [{}, {"max_tokens": 900}, {"mode": "packed", "max_length": 32}])
def test_a_stream_goes_on_at_any_place_with_the_same_batches(tiny_model, token_data, options):
    data = [sample["input_ids"] for sample in token_data]
    whole = list(open_stream(tiny_model, [1, 3], window=32, batch_tokens=256, **options).batches(data))
    assert len(whole) > 4
    places = [Place(), *(batch.place for batch in whole)]
    for start in (0, 1, len(whole) // 2, len(whole) - 1):
        again = list(
            open_stream(tiny_model, [1, 3], window=32, batch_tokens=256, **options).batches(data, start=places[start])
        )
        assert len(again) == len(whole) - start
        for a, b in zip(again, whole[start:], strict=True):
            assert a.place == b.place
            assert all(torch.equal(a.vectors[name], b.vectors[name]) for name in b.vectors)
            assert all((a.labels[name] == b.labels[name]).all() for name in b.labels)


def test_a_stream_gives_the_rows_that_a_harvest_writes(tmp_path, tiny_model, tokenizer):
    options = {"tokenizer": tokenizer, "mode": "prompt+response"}
    batches = list(open_stream(tiny_model, [1], **options).batches([GOOD] * 5))
    stored = harvest(tiny_model, [GOOD] * 5, [1], out=tmp_path, dtype="float32", progress=False, **options)["layers.1"]
    assert torch.equal(torch.cat([b.vectors["layers.1"] for b in batches]), stored.read_all())
    columns = stored.columns()
    assert set(columns) == set(batches[0].labels)
    assert all((np.concatenate([b.labels[name] for b in batches]) == columns[name]).all() for name in columns)


def test_a_stream_knows_how_much_is_left(tiny_model, token_data):
    total = sum(len(sample["input_ids"]) for sample in token_data)
    stream = open_stream(tiny_model, [1], batch_tokens=256)
    walk = stream.batches(token_data)
    next(walk)
    assert stream.counts.tokens < total == stream.expected(len(token_data))
    small = open_stream(tiny_model, [1], batch_tokens=256, window=30)
    seen = [small.expected(len(token_data)) for _ in small.batches(token_data)]
    assert seen[-1] == total and all(abs(guess - total) < 0.4 * total for guess in seen if guess is not None)
