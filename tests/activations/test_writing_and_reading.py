"""What is written is what is read: values, labels, statistics, splits, files cut between samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsae.activations import ActivationDataset, ActivationWriter, SplitRule, describe, scale_for
from hubsae.activations.layout import shards_in
from hubsae.core.errors import ConfigError, DataError, NotFoundError


def in_order(data: ActivationDataset) -> np.ndarray:
    """Row of the original matrix for each stored row."""
    labels = data.columns(["sample_id", "position"])
    return labels["sample_id"] * 50 + labels["position"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_read_values_are_the_written_ones_and_pyarrow_agrees_bit_for_bit(written, dtype):
    out, x = written(dtype=dtype, shard_bytes=20_000)
    data = ActivationDataset.open(out)
    expected = x.to(getattr(torch, dtype))[in_order(data)]
    assert torch.equal(data.read_all(), expected)
    assert torch.equal(torch.cat(list(data.batches(700, shuffle=False))), expected)
    tables = [pq.read_table(s.name, page_checksum_verification=True) for s in data.sources]
    values = np.concatenate([t["vector"].combine_chunks().flatten().to_numpy() for t in tables]).reshape(-1, data.d)
    assert values.tobytes() == data.read_all().numpy().tobytes()
    assert all(s.pages is not None for s in data.sources), "the direct path was not taken"
    assert len(data.sources) > 3


def test_labels_stay_with_their_rows_when_shuffled(written):
    out, x = written()
    data = ActivationDataset.open(out, "layers.6")
    seen = 0
    for found, labels in data.labelled_batches(["token_id", "position", "sample_id", "is_prompt"], 512, seed=3):
        rows = labels["sample_id"] * 50 + labels["position"]
        assert torch.equal(found, x.half()[torch.from_numpy(rows)])
        assert np.array_equal(labels["is_prompt"], labels["position"] < 10)
        assert np.array_equal(labels["token_id"], rows % 97)
        seen += len(rows)
    assert seen == len(data) == 3000


def test_files_are_cut_between_samples(written):
    out, _ = written(rows=5000, shard_bytes=30_000)
    paths = shards_in(out / "layers.6")["train"]
    samples = [set(pq.read_table(p, columns=["sample_id"])["sample_id"].to_pylist()) for p in paths]
    assert len(paths) > 3
    assert sum(len(s) for s in samples) == len(set.union(*samples)) == 100


def test_statistics_equal_those_of_the_matrix(written):
    out, x = written(rows=6000, shard_bytes=40_000)
    stats = ActivationDataset.open(out).stats
    wide = x.double()
    assert stats.count == 6000
    assert torch.allclose(stats.mean, wide.mean(0), atol=1e-5)
    assert torch.allclose(stats.std, wide.std(0, unbiased=False), rtol=1e-5)
    rest = wide[torch.arange(6000) % 50 != 0]
    assert torch.allclose(stats.std_without_first, rest.std(0, unbiased=False), rtol=1e-5)
    norms = wide.norm(dim=1)
    assert stats.norm_percentiles["0"] == pytest.approx(norms.min().item(), rel=1e-6)
    assert stats.norm_percentiles["100"] == pytest.approx(norms.max().item(), rel=1e-6)
    assert stats.norm_percentiles["50"] == pytest.approx(norms.quantile(0.5).item(), rel=0.012)
    assert stats.massive_share == pytest.approx(0.02, abs=0.001)
    assert stats.summary()["position_0"]["count"] == 120
    assert stats.pooled_variance == pytest.approx(wide.var(unbiased=False).item(), rel=1e-5)
    assert stats.normalizer().count == 6000


def test_statistics_are_stable_far_from_zero(tmp_path):
    x = torch.randn(4000, 8, dtype=torch.float64) * 0.01 + 300.0
    with ActivationWriter(tmp_path, d=8, config="layers.0", dtype="float32") as writer:
        for part in x.float().split(333):
            writer.write(part, sample_id=0, position=1)
    std = ActivationDataset.open(tmp_path).stats.std
    assert torch.allclose(std, x.float().double().std(0, unbiased=False), rtol=1e-3)


def test_a_split_by_sample_never_divides_a_sample_and_does_not_depend_on_order(tmp_path):
    rule = SplitRule("sample", 0.3, seed=5)
    for name, order in (("a", range(40)), ("b", reversed(range(40)))):
        with ActivationWriter(tmp_path / name, d=4, config="layers.1", split=rule) as writer:
            for sample in order:
                writer.write(torch.full((7, 4), float(sample)), sample_id=sample, position=np.arange(7))
    found = {}
    for name in ("a", "b"):
        parts = {s: set(ActivationDataset.open(tmp_path / name, split=s).columns("sample_id")["sample_id"].tolist())
                 for s in ("train", "validation")}  # fmt: skip
        assert not parts["train"] & parts["validation"]
        assert parts["train"] | parts["validation"] == set(range(40))
        found[name] = parts
    assert found["a"] == found["b"]
    assert 4 <= len(found["a"]["validation"]) <= 20


def test_token_and_tail_splits(tmp_path):
    for kind in ("token", "tail"):
        rule = SplitRule(kind, 0.25, n_samples=20)
        with ActivationWriter(tmp_path / kind, d=2, config="layers.1", split=rule) as writer:
            for sample in range(20):
                writer.write(torch.ones(50, 2), sample_id=sample, position=np.arange(50))
    token = ActivationDataset.open(tmp_path / "token", split="validation")
    assert 200 <= len(token) <= 300
    assert len(set(token.columns("sample_id")["sample_id"].tolist())) == 20
    tail = ActivationDataset.open(tmp_path / "tail", split="validation")
    assert set(tail.columns("sample_id")["sample_id"].tolist()) == {15, 16, 17, 18, 19}


def test_scaled_float16_is_exact_for_bfloat16_sources(tmp_path):
    x = (torch.randn(2000, 16) * 5).bfloat16()
    x[7, 3] = 700_000.0
    scale = scale_for(float(x.abs().max()))
    assert 700_000 * scale < 65504 / 3
    with ActivationWriter(tmp_path, d=16, config="layers.2", scale=scale) as writer:
        writer.write(x, sample_id=0)
    data = ActivationDataset.open(tmp_path)
    assert data.scale == scale and data.dtype == torch.float32
    error = (data.read_all() - x.float()).abs()
    assert error.max() <= 2.0**-24 / scale and torch.equal(data.read_all()[7, 3], x[7, 3].float())
    assert (error == 0).float().mean() > 0.99
    assert torch.allclose(data.stats.mean, x.double().mean(0), rtol=1e-5)


def test_extra_columns_of_every_type(tmp_path):
    kinds = {"reward": "float32", "step": "int64", "good": "bool", "name": "string", "exact": "float64"}
    with ActivationWriter(tmp_path, d=4, config="layers.2", columns=kinds) as writer:
        for sample in range(5):
            writer.write(
                torch.ones(9, 4) * sample, sample_id=sample, position=np.arange(9), reward=np.linspace(0, 1, 9),
                step=sample * 10**12, good=sample % 2 == 0, name=f"grün {sample}", exact=1 / 3,
            )  # fmt: skip
    data = ActivationDataset.open(tmp_path)
    found = data.columns()
    assert found["name"][9] == "grün 1" and found["step"][-1] == 4 * 10**12 and found["exact"][0] == 1 / 3
    assert found["good"][0] and not found["good"][9]
    assert found["reward"].dtype == np.float32 and found["reward"][8] == 1.0
    batch = next(data.labelled_batches(list(kinds), 20, shuffle=False))
    assert list(batch.labels) == list(kinds)
    assert all(np.array_equal(batch.labels[name], found[name][:20]) for name in kinds)


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 70),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    shard_bytes=st.integers(1, 60_000),
    batch=st.integers(1, 130),
    half=st.booleans(),
)
def test_any_shape_survives(tmp_path_factory, d, sizes, shard_bytes, batch, half):
    out = tmp_path_factory.mktemp("any")
    x = torch.randn(sum(sizes), d)
    with ActivationWriter(
        out, d=d, config="layers.0", dtype="float16" if half else "float32", shard_bytes=shard_bytes
    ) as w:
        for sample, part in enumerate(x.split(sizes)):
            w.write(part, sample_id=sample, position=np.arange(len(part)))
    data = ActivationDataset.open(out)
    assert torch.equal(data.read_all(), x.half() if half else x)
    got = torch.cat(list(data.batches(batch, seed=1)))
    assert torch.equal(got.sum(1).sort().values, data.read_all().sum(1).sort().values)
    table = pq.read_table(sorted((out / "layers.0").glob("*.parquet"))[0], page_checksum_verification=True)
    assert table["vector"][0].as_py() == data.read_all()[0].tolist()


def test_large_vectors_cross_pages_and_row_groups(tmp_path):
    x = torch.randn(9000, 4096).half()
    with ActivationWriter(tmp_path, d=4096, config="layers.0") as writer:
        for sample, part in enumerate(x.split(1500)):
            writer.write(part, sample_id=sample)
    data = ActivationDataset.open(tmp_path)
    assert [n for _, n in data.sources[0].blocks][:2] == [1024, 1024]
    assert len(data.sources[0].footer.row_groups) == 2
    assert torch.equal(torch.cat([b.clone() for b in data.batches(1000, shuffle=False)]), x)
    assert torch.equal(data.take([8999, 0, 5000, 0]), x[[8999, 0, 5000, 0]])


def test_memory_of_the_writer_is_flat(tmp_path):
    import resource

    x = torch.randn(4096, 512).half()
    with ActivationWriter(tmp_path, d=512, config="layers.0", finalize=False) as writer:
        for sample in range(10):
            writer.write(x, sample_id=sample)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for sample in range(10, 110):
            writer.write(x, sample_id=sample)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert writer.n_rows == 110 * 4096
    assert grown < 60_000, f"{grown} kB more after 420 MB"  # 420 MB were written


def test_a_reopened_writer_knows_what_is_done_and_writes_nothing_twice(tmp_path):
    def write(writer, samples):
        for sample in samples:
            writer.write(torch.full((20, 4), float(sample)), sample_id=sample, position=np.arange(20))

    first = ActivationWriter(tmp_path, d=4, config="layers.3", shard_bytes=500, source={"model": "m"})
    write(first, range(10))  # and then the process is killed: nothing is closed
    (tmp_path / "layers.3" / ".train-00000-00009.parquet.abc.tmp").write_bytes(b"PAR1 unfinished")
    with ActivationWriter(tmp_path, d=4, config="layers.3", shard_bytes=500, source={"model": "m"}) as second:
        done = second.done(np.arange(12))
        assert 5 <= done.sum() < 10 and not done[10:].any()
        write(second, range(12))
    data = ActivationDataset.open(tmp_path)
    ids, counts = np.unique(data.columns("sample_id")["sample_id"], return_counts=True)
    assert ids.tolist() == list(range(12)) and set(counts.tolist()) == {20}
    assert not list((tmp_path / "layers.3").glob(".*.tmp"))
    assert data.stats.count == 240


def test_a_writer_that_fails_leaves_finished_files_only(tmp_path):
    with pytest.raises(RuntimeError), ActivationWriter(tmp_path, d=4, config="layers.3", shard_bytes=100) as writer:
        writer.write(torch.ones(50, 4), sample_id=0)
        writer.write(torch.ones(50, 4), sample_id=1)
        raise RuntimeError("stop")
    assert len(ActivationDataset.open(tmp_path)) == 50
    left = sorted(p.name for p in (tmp_path / "layers.3").iterdir())
    assert left == [".journal-00000.json", "train-00000-00000.parquet"]


def test_what_cannot_be_stored_is_refused_with_the_way_out(tmp_path):
    with ActivationWriter(tmp_path, d=4, config="layers.3") as writer:
        with pytest.raises(DataError, match=r"700000 does not fit float16(.|\n)*scale=0.015625"):
            writer.write(torch.full((2, 4), 7e5))
        with pytest.raises(DataError, match="infinity or NaN"):
            writer.write(torch.tensor([[1.0, float("nan"), 0, 0]]))
        with pytest.raises(DataError, match=r"expected vectors of shape \[rows, 4\], found \(2, 5\)"):
            writer.write(torch.ones(2, 5))
        with pytest.raises(DataError, match="expected 2 values"):
            writer.write(torch.ones(2, 4), token_id=[1, 2, 3])
        with pytest.raises(DataError, match="extra columns"):
            writer.write(torch.ones(2, 4), reward=1.0)
        writer.write(torch.ones(3, 4))
    assert len(ActivationDataset.open(tmp_path)) == 3
    with pytest.raises(ConfigError, match="bfloat16"):
        ActivationWriter(tmp_path / "b", d=4, config="x", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="power of two"):
        ActivationWriter(tmp_path / "b", d=4, config="x", scale=0.3)
    with pytest.raises(DataError, match="cannot name a config"):
        ActivationWriter(tmp_path / "b", d=4, config="../evil")
    with pytest.raises(DataError, match="d 4 instead of 8"):
        ActivationWriter(tmp_path, d=8, config="layers.3")
    with pytest.raises(DataError, match="model None instead of 'b'"):
        ActivationWriter(tmp_path, d=4, config="layers.3", source={"model": "b"})


def test_opening_says_what_there_is(tmp_path, written):
    out, _ = written()
    with pytest.raises(NotFoundError, match=r"no config '7'(.|\n)*layers.6"):
        ActivationDataset.open(out, 7)
    with pytest.raises(NotFoundError, match=r"no split 'test'(.|\n)*train"):
        ActivationDataset.open(out, split="test")
    with pytest.raises(NotFoundError, match="does not exist"):
        ActivationDataset.open(tmp_path / "nowhere")
    with ActivationWriter(out, d=4, config="ppo_step10.layers.8") as writer:
        writer.write(torch.ones(2, 4))
    with pytest.raises(NotFoundError, match=r"say which(.|\n)*layers.6, ppo_step10.layers.8"):
        ActivationDataset.open(out)
    for name in (8, "model.layers.8", "blocks.8.hook_resid_post", "ppo_step10.layers.8"):
        assert ActivationDataset.open(out, name).config == "ppo_step10.layers.8"
    with pytest.raises(DataError, match="no column 'reward'"):
        ActivationDataset.open(out, 8).columns("reward")
    info = describe(out)
    assert [c["config"] for c in info["configs"]] == ["layers.6", "ppo_step10.layers.8"]
    assert info["configs"][0]["splits"] == {"train": 3000}
    assert sum(n for _, _, n in info["configs"][0]["histogram"]) == 3000


def test_an_edited_card_is_kept(written):
    out, _ = written()
    readme = Path(out) / "README.md"
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    with ActivationWriter(out, d=4, config="layers.8") as writer:
        writer.write(torch.ones(2, 4))
    text = readme.read_text()
    assert "My own words." in text and "`layers.8`" in text and "config_name: layers.8" in text


def test_a_dataset_in_memory_behaves_like_one_on_disk():
    x = torch.randn(5000, 8)
    data = ActivationDataset.from_tensor(x, sample_id=np.arange(5000) // 10)
    assert torch.allclose(data.stats.mean, x.double().mean(0), atol=1e-6)
    got = [(x.clone(), labels["sample_id"]) for x, labels in data.labelled_batches(["sample_id"], 640)]
    assert sorted(np.concatenate([s for _, s in got]).tolist()) == (np.arange(5000) // 10).tolist()
    assert torch.equal(torch.cat([v for v, _ in got]).sum(1).sort().values, x.sum(1).sort().values)


def test_a_batch_that_is_kept_is_never_overwritten(written):
    out, _ = written()
    data = ActivationDataset.open(out)
    kept = list(data.batches(300, seed=2))
    again = [b.clone() for b in data.batches(300, seed=2)]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize(
    "first",
    [
        "from hubsae.activations import ActivationDataset\n"
        "    next(iter(ActivationDataset.open({out!r}).labelled_batches(['position'], 100)))",
        "from hubsae.core.parquet import table_of\n    table_of({{'feature': [1]}}, {{'feature': 'int32'}})",
    ],
    ids=["labels are read", "a table is made"],
)
def test_ctrl_c_is_heard_at_the_first_conversion(written, tmp_path, first):
    out, _ = written()
    slow = tmp_path / "slow" / "pandas"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    {first.format(out=str(out))}
except KeyboardInterrupt:
    print("heard")
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(slow.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "heard\n", done.stderr
