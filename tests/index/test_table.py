"""The feature table: the records of a full sort, for any order and partition; refused where parts do not belong."""

import itertools
import random

import numpy as np
import pytest
import torch

from hubsae.core.config import SAEConfig
from hubsae.core.errors import DataError
from hubsae.core.sae import SAE
from hubsae.core.scopes import parse
from hubsae.evals.accumulate import mix
from hubsae.evals.passes import BLOCK_ROWS, run_pass
from hubsae.index.table import FeatureTable
from hubsae.index.tally import BINS, bin_edges, bins_of

F, K, ROWS = 97, 6, 3000


@pytest.fixture(scope="module")
def stream():
    """Codes with many ties (float16 values), negative ones, padding, samples of all lengths."""
    g = np.random.default_rng(0)
    share = 1 / np.arange(1, F + 1) ** 1.2
    indices = np.stack([g.choice(F, K, replace=False, p=share / share.sum()) for _ in range(ROWS)]).astype(np.int32)
    values = (g.standard_normal((ROWS, K)) * 2).round(1).astype(np.float32)
    indices[values == 0] = 0
    lengths = g.integers(1, 60, ROWS)
    sample = np.repeat(np.arange(ROWS), lengths)[:ROWS]
    starts = np.concatenate([[True], sample[1:] != sample[:-1]])
    position = np.arange(ROWS) - np.maximum.accumulate(np.where(starts, np.arange(ROWS), 0))
    role = np.where(sample % 2 == 0, "user", "assistant")
    labels = {"sample_id": sample, "position": position, "token_id": g.integers(0, 50, ROWS), "role": role}
    return indices, values, {**labels, "is_special": position % 7 == 3}


def part(stream, low, high):
    indices, values, labels = stream
    return indices[low:high], values[low:high], {name: column[low:high] for name, column in labels.items()}


def table_of(stream, cuts=(0, ROWS), *, top=3, draw=2, window=4, around=None, **options):
    """A table of the rows between cuts, block by block; `around` rows on both sides are shown as context."""
    table = FeatureTable("a", F, top=top, random=draw, window=window, **options)
    for low, high in itertools.pairwise(cuts):
        table.add_codes(*part(stream, low, high), low)
    return table


def oracle(stream, f, top, draw):
    """The records of one feature by a full sort: (strongest tokens, strongest samples, random ones)."""
    indices, values, labels = stream
    rows, places = np.nonzero((indices == f) & (values != 0))
    found = sorted((-float(values[r, p]), int(r)) for r, p in zip(rows, places, strict=True))
    tokens = [r for _, r in found[:top]]
    seen, prompts = set(), []
    for _, r in found:
        if labels["sample_id"][r] not in seen:
            seen.add(labels["sample_id"][r])
            prompts.append(r)
    hashed = sorted((int(mix(np.array([r]))[0]), r) for _, r in found)
    return tokens, prompts[:top], {r for _, r in hashed[:draw]}, found


@pytest.mark.parametrize(("top", "draw"), [(1, 0), (3, 2), (5, 7), (400, 1)])
@pytest.mark.parametrize(("rows", "waiting"), [(64, 1 << 15), (64, 50), (100_000, 5000)])
def test_the_records_are_those_of_a_full_sort_bit_for_bit(top, draw, rows, waiting, stream, monkeypatch):
    monkeypatch.setattr("hubsae.index.table.WAITING", waiting)
    cuts = [0, 500, 501, 1300, 2999, ROWS]
    table = table_of(stream, cuts, top=top, draw=draw, rows=rows).result()
    from hubsae.index.best import keep

    held = table.records
    kept = keep(held.feature, held.value, held.index, held.sample, top, draw)
    for f in range(F):
        tokens, prompts, drawn, found = oracle(stream, f, top, draw)
        mine = kept.rows[held.feature[kept.rows] == f]
        ranks = {name: getattr(kept, name)[held.feature[kept.rows] == f] for name in kept._fields[1:]}
        index = held.index[mine]
        assert index[ranks["token_rank"] >= 0].tolist() == tokens
        assert index[ranks["prompt_rank"] >= 0].tolist() == prompts
        assert set(index[ranks["random_rank"] >= 0].tolist()) == drawn
        assert table.count[f] == len(found)
        assert table.sum[f] / 2**20 == pytest.approx(-sum(v for v, _ in found), abs=1e-4)


def test_windows_show_the_feature_at_every_token_of_the_sample(stream):
    indices, values, labels = stream
    held = table_of(stream, (0, 700, 1100, ROWS), rows=64).result().records
    dense = np.zeros((ROWS, F), np.float32)
    np.put_along_axis(dense, indices, values, 1)
    dense[:, 0] = np.where(indices == 0, values, 0).sum(1)
    assert len(held.feature) > 300
    for i in range(len(held.feature)):
        row = int(held.index[i])
        for column, other in enumerate(range(row - 4, row + 5)):
            same = 0 <= other < ROWS and labels["sample_id"][other] == labels["sample_id"][row]
            assert held.ids[i, column] == (labels["token_id"][other] if same else -1)
            assert held.around[i, column] == (dense[other, held.feature[i]] if same else 0)
        assert held.around[i, 4] == held.value[i]


def test_counts_by_position_special_and_size(stream):
    indices, values, labels = stream
    table = table_of(stream).result()
    fires = values != 0
    for mask, found in ((labels["position"] == 0, table.first), (labels["is_special"], table.special)):
        assert np.array_equal(found, np.bincount(indices[mask][fires[mask]], minlength=F))
    edges = np.array(bin_edges())
    for f in range(0, F, 9):
        sizes = np.abs(values[(indices == f) & fires])
        assert np.array_equal(table.histogram[f], np.histogram(sizes, edges)[0])
    assert bins_of(np.float32([1e-30, 1.0, 1.49, 1.5, -3.0, 1e30])).tolist() == [0, 32, 32, 33, 35, BINS - 1]


def blocks_with_halo(stream, table, low, high, around=4):
    """What a pass shows of a part: its rows, and those beside it as context."""
    if low:
        table.add_codes(*part(stream, max(0, low - around), low), max(0, low - around), halo=True)
    table.add_codes(*part(stream, low, high), low)
    if high < ROWS:
        table.add_codes(*part(stream, high, min(high + around, ROWS)), high, halo=True)
    return table


@pytest.mark.parametrize("seed", range(6))
def test_any_partition_and_order_of_parts_gives_the_same_bytes(seed, stream, tmp_path, monkeypatch):
    whole = table_of(stream).save(tmp_path / "whole").read_bytes()
    monkeypatch.setattr("hubsae.index.table.WAITING", 20 * seed)
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.sample(range(1, ROWS), 40)), ROWS]
    parts = []
    for low, high in itertools.pairwise(cuts):
        table = blocks_with_halo(stream, FeatureTable("a", F, top=3, random=2, window=4), low, high)
        parts.append(FeatureTable.open(table.save(tmp_path / f"{low}")) if rng.random() < 0.3 else table)
    rng.shuffle(parts)
    while len(parts) > 1:  # merged as a random tree
        one = parts.pop(rng.randrange(len(parts)))
        parts[rng.randrange(len(parts))].merge(one)
    assert parts[0].save(tmp_path / "merged").read_bytes() == whole


@pytest.mark.slow
def test_two_hundred_shards_merged_as_random_trees_give_the_same_bytes(stream, tmp_path):
    whole = table_of(stream).save(tmp_path / "whole").read_bytes()
    for seed in range(5):
        rng = random.Random(seed)
        cuts = [0, *sorted(rng.sample(range(1, ROWS), 199)), ROWS]
        tables = [FeatureTable("a", F, top=3, random=2, window=4) for _ in cuts[1:]]
        spans = zip(tables, itertools.pairwise(cuts), strict=True)
        parts = [blocks_with_halo(stream, table, *span).save(tmp_path / f"{span[0]}") for table, span in spans]
        rng.shuffle(parts)
        merged = [FeatureTable.open(path) for path in parts]
        while len(merged) > 1:
            one = merged.pop(rng.randrange(len(merged)))
            merged[rng.randrange(len(merged))].merge(one)
        assert merged[0].save(tmp_path / "merged").read_bytes() == whole


def test_blocks_in_another_order_give_the_same_records(stream, tmp_path):
    whole = table_of(stream, window=0).save(tmp_path / "whole").read_bytes()
    table = FeatureTable("a", F, top=3, random=2, window=0)
    for low in (2000, 0, 1000):
        table.add_codes(*part(stream, low, low + 1000), low)
    assert table.save(tmp_path / "other").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top": 4}, "top is 3 in one and 4"),
        ({"window": 5}, "window is 4 in one and 5"),
        ({"identity": {"sha256": "b", "tokenizer": "x"}}, "sha256 is 'a' in one and 'b'"),
        ({"identity": {"sha256": "a", "tokenizer": "y"}}, "tokenizer is 'x' in one and 'y'"),
        ({"scope": parse("not position_0")}, "about 'all', the other about 'not position_0'"),
    ],
)
def test_tables_that_do_not_belong_together_are_not_merged(options, error):
    settings = {"top": 3, "random": 2, "window": 4, "identity": {"sha256": "a", "tokenizer": "x"}}
    with pytest.raises(DataError, match=error):
        FeatureTable("a", F, **settings).merge(FeatureTable("a", F, **{**settings, **options}))


def test_rows_are_not_taken_in_twice(stream):
    one, other = table_of(stream, (0, 2000)), table_of(stream, (1500, ROWS))
    with pytest.raises(DataError, match="rows 1500 to 2000 were taken in already"):
        one.merge(other)


def test_a_scope_limits_what_is_counted_and_not_what_is_shown(stream):
    indices, values, labels = stream
    scope = parse("not position_0")
    table = FeatureTable("a", F, top=3, random=2, window=4)
    table.scope = scope
    table.add_codes(indices, values, labels, 0, scope=scope)
    keep = labels["position"] > 0
    fires = values[keep] != 0
    assert table.n_tokens == int(keep.sum()) and table.n_rows == ROWS
    assert np.array_equal(table.count, np.bincount(indices[keep][fires], minlength=F))
    assert (table.result().records.position > 0).all()
    assert (table.records.ids[table.records.position == 1][:, 3] >= 0).all()


def test_a_pass_by_parts_with_its_halo_is_the_pass_over_everything(tmp_path):
    sae = SAE.random(SAEConfig(architecture="jumprelu", d_in=16, d_sae=64))
    n = 3 * BLOCK_ROWS + 100
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    labels = {"sample_id": torch.arange(n) // 50, "position": torch.arange(n) % 50, "token_id": torch.arange(n) % 11}
    whole, merged = FeatureTable("a", 64, top=2), None
    run_pass(x, {"a": sae}, [whole], columns=labels)
    for first in (2, 0, 3, 1):
        table = FeatureTable("a", 64, top=2)
        run_pass(x, {"a": sae}, [table], columns=labels, blocks=(first, first + 1))
        if merged is None:
            merged = table
        else:
            merged.merge(table)
    assert merged.save(tmp_path / "b").read_bytes() == whole.save(tmp_path / "a").read_bytes()
