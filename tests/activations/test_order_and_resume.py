"""Shuffling covers every row once, ranks are disjoint, and a saved state continues with the very next row."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsae.activations import ActivationDataset, ActivationWriter
from hubsae.core.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """4,000 rows in many small files; each vector holds its own number."""
    out = tmp_path_factory.mktemp("order")
    with ActivationWriter(out, d=3, config="layers.0", dtype="float32", shard_bytes=3000) as writer:
        for sample in range(100):
            rows = np.arange(sample * 40, sample * 40 + 40)
            writer.write(torch.tensor(rows)[:, None].expand(-1, 3).float(), sample_id=sample, position=np.arange(40))
    return out


def numbers(batches) -> list[int]:
    return [int(v) for b in batches for v in (b if isinstance(b, torch.Tensor) else b[0])[:, 0].tolist()]


WINDOW = 4000  # bytes: a few files each


def test_every_row_comes_once_in_an_order_of_its_own(folder):
    data = ActivationDataset.open(folder)
    first = numbers(data.batches(128, window_bytes=WINDOW))
    assert sorted(first) == list(range(4000)) and first != sorted(first)
    assert first == numbers(data.batches(128, window_bytes=WINDOW))
    assert first != numbers(data.batches(128, window_bytes=WINDOW, epoch=1))
    assert first != numbers(data.batches(128, window_bytes=WINDOW, seed=1))
    assert numbers(data.batches(77, shuffle=False)) == sorted(first)
    # batch size does not change the order
    assert first == numbers(data.batches(999, window_bytes=WINDOW))
    assert [len(b) for b in data.batches(999, drop_last=True)] == [999] * 4


def test_the_order_does_not_follow_the_cut_into_files(folder, tmp_path):
    """A harvest that was stopped and went on has other files, and trains to the same numbers."""
    x = ActivationDataset.open(folder).read_all()
    with ActivationWriter(tmp_path, d=3, config="layers.0", dtype="float32") as writer:
        writer.write(x, sample_id=np.arange(4000) // 40, position=np.arange(4000) % 40)
    one, many = ActivationDataset.open(tmp_path), ActivationDataset.open(folder)
    assert len(one.sources) == 1 and len(many.sources) > 10
    for options in ({}, {"window_bytes": WINDOW}, {"seed": 3, "epoch": 2}, {"world_size": 2, "rank": 1}):
        assert numbers(one.batches(128, **options)) == numbers(many.batches(128, **options))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_windows_read_ahead_come_in_the_same_order_and_go_on_from_the_same_state(folder, prefetch):
    plain, data = ActivationDataset.open(folder), ActivationDataset.open(folder)
    for one in (plain, data):
        one.window_bytes = WINDOW
    data.prefetch = prefetch
    expected = numbers(plain.batches(128))
    assert numbers(data.batches(128)) == expected
    started, got = data.batches(128), []
    for _ in range(5):
        got += numbers([next(started)])
    state = data.state_dict()
    del started  # what is still being read is let go
    plain.load_state_dict(state)
    assert got + numbers(plain.batches(128)) == expected


def test_as_many_windows_are_read_ahead_as_are_asked_for(folder):
    for prefetch in (0, 2):
        data, read = ActivationDataset.open(folder), []
        data.window_bytes, data.prefetch = WINDOW, prefetch
        load = data.shards.read
        data.shards.read = lambda first, rows, out, load=load, read=read: (read.append(rows), load(first, rows, out))[1]
        batches = data.batches(64)
        next(batches)
        wanted, waited = (1 + prefetch) * WINDOW // 12, 0.0
        while sum(read) < wanted - 32 and waited < 20:
            time.sleep(0.01)
            waited += 0.01
        assert wanted - 32 <= sum(read) <= wanted + 32


def test_a_window_mixes_distant_rows(folder):
    data = ActivationDataset.open(folder)
    batch = numbers([next(iter(data.batches(256)))])
    assert np.abs(np.diff(batch)).mean() > 800


@settings(max_examples=20, deadline=None)
@given(world=st.integers(1, 7), batch=st.integers(1, 300), shuffle=st.booleans(), seed=st.integers(0, 3))
def test_ranks_are_disjoint_and_equally_long(folder, world, batch, shuffle, seed):
    data = ActivationDataset.open(folder)
    options = {"shuffle": shuffle, "seed": seed, "world_size": world, "window_bytes": WINDOW}
    parts = [numbers(data.batches(batch, rank=r, **options)) for r in range(world)]
    together = [n for part in parts for n in part]
    assert len(together) == len(set(together))
    assert len({len(part) for part in parts}) == 1
    if batch * world < 200:  # what is dropped is less than a batch per rank, and what ranks differ by
        assert len(together) > 4000 * 0.8
    every = [n for r in range(world) for n in numbers(data.batches(batch, rank=r, drop_last=False, **options))]
    assert sorted(every) == list(range(4000))


@settings(max_examples=30, deadline=None)
@given(
    stop=st.integers(0, 60),
    batch=st.integers(20, 200),
    shuffle=st.booleans(),
    world=st.integers(1, 3),
    drop=st.booleans(),
)
def test_a_saved_state_continues_exactly(folder, stop, batch, shuffle, world, drop):
    options = {"shuffle": shuffle, "rank": world - 1, "world_size": world, "window_bytes": WINDOW, "epoch": 2}
    options["drop_last"] = drop
    data = ActivationDataset.open(folder)
    whole = numbers(data.batches(batch, **options))
    seen = []
    for number, part in enumerate(data.batches(batch, **options)):
        if number == stop:
            break
        seen += numbers([part])
        state = data.state_dict()
    if stop == 0 or len(seen) == len(whole):
        return
    fresh = ActivationDataset.open(folder)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert seen + numbers(fresh.batches(batch, **options)) == whole


def test_a_state_of_something_else_is_refused(folder):
    data = ActivationDataset.open(folder)
    next(iter(data.batches(100)))
    state = data.state_dict()
    for change in ({"seed": 9}, {"shuffle": False}, {"epoch": 1}, {"world_size": 2}, {"window_bytes": WINDOW}):
        data.load_state_dict(state)
        with pytest.raises(DataError, match="cannot continue"):
            data.batches(100, **change)
    assert len(numbers(data.batches(100))) == 4000, "a refused state is forgotten"


def test_the_end_of_an_epoch_leads_to_the_next(folder):
    data = ActivationDataset.open(folder)
    for _ in data.batches(500):
        pass
    state = data.state_dict()
    assert (state["epoch"], state["window"], state["offset"]) == (1, 0, 0)
    data.load_state_dict(state)
    assert len(numbers(data.batches(500, epoch=1))) == 4000


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_dataloader_takes_it(folder, workers):
    loader = torch.utils.data.DataLoader(
        ActivationDataset.open(folder).as_iterable(128, columns=["sample_id"]), batch_size=None, num_workers=workers
    )
    rows = numbers(loader)
    assert sorted(rows) == list(range(4000))


def test_wrong_arguments(folder):
    data = ActivationDataset.open(folder)
    with pytest.raises(ConfigError, match="rank 2 is outside"):
        data.batches(10, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="batch_size 0"):
        data.batches(0)
    with pytest.raises(DataError, match="has rows 0 to 3999"):
        data.take([4000])
