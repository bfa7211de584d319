"""A harvest in parts: every number of ranks writes the same bytes, also where one was stopped in the middle."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hubsae.activations import ActivationDataset, harvest
from hubsae.activations.convert import convert
from hubsae.activations.ranks import Ranks
from hubsae.core.errors import ConfigError, DataError

OPTIONS = {"batch_tokens": 300, "window": 16, "validation_fraction": 0.2, "shard_bytes": 20_000, "progress": False}


def contents(folder: Path) -> dict[str, str]:
    """Every file that is no marker of a run, by its hash."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    shown = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in shown}


def in_parts(model, data, out: Path, world: int = 1, ranks: range | None = None, **options) -> Path:
    for rank in ranks or range(world):
        harvest(model, data, [1, 3], out=out, rank=rank, world_size=world, parts=True, **{**OPTIONS, **options})
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_model, token_data):
    return in_parts(tiny_model, token_data, tmp_path_factory.mktemp("parts") / "one")


def test_any_number_of_ranks_writes_the_same_bytes(tmp_path, tiny_model, token_data, one):
    assert len(list((one / "layers.1").glob("train-*.parquet"))) > 10
    for world in (4, 7):
        assert contents(in_parts(tiny_model, token_data, tmp_path / f"{world}", world)) == contents(one)


def test_the_rows_are_those_of_an_ordinary_harvest_in_the_same_order(tmp_path, tiny_model, token_data, one):
    whole = harvest(tiny_model, token_data, [1, 3], out=tmp_path / "whole", **OPTIONS)
    for name in whole:
        for split in ("train", "validation"):
            data, parts = (ActivationDataset.open(folder, name, split) for folder in (tmp_path / "whole", one))
            assert torch.equal(data.read_all(), parts.read_all())
            labels, other = data.columns(), parts.columns()
            assert all(np.array_equal(labels[column], other[column]) for column in labels)


def test_a_part_that_was_stopped_is_made_anew_and_finished_ones_are_not_touched(tmp_path, tiny_model, token_data, one):
    class Stopped(Exception):
        pass

    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 14:
            raise Stopped

    handle = tiny_model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(Stopped):
        in_parts(tiny_model, token_data, tmp_path)
    handle.remove()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / ".harvest").rglob("[0-9]*.json")}
    assert 0 < len(done) < 10 and not (tmp_path / "activations.json").exists()
    # what a kill leaves: a file of a part without its marker
    torn = tmp_path / "layers.1" / "train-00008-00003.parquet"
    torn.write_bytes(b"torn")
    in_parts(tiny_model, token_data, tmp_path, 3)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert not torn.exists() and contents(tmp_path) == contents(one)


def test_samples_that_cannot_be_used_are_counted_once_whoever_meets_them(tmp_path, tiny_model, tokenizer):
    chats = [
        {"messages": [{"role": "user", "content": f"Ann has {n}"}] * (n % 5 != 3)} for n in range(40)
    ]  # every fifth chat is empty
    options = {"tokenizer": tokenizer, "mode": "prompt", "window": 8}
    found = {world: in_parts(tiny_model, chats, tmp_path / f"{world}", world, **options) for world in (1, 3)}
    assert '"bad": 8' in (found[1] / "activations.json").read_text()
    assert contents(found[1]) == contents(found[3])


def test_packed_blocks_come_in_parts_too(tmp_path, tiny_model, tokenizer):
    texts = ["Ann has 12 apples and eats 3 of them " * (1 + n % 4) for n in range(60)]
    options = {"tokenizer": tokenizer, "mode": "packed", "max_length": 16, "window": 8, "max_tokens": 700}
    found = {world: in_parts(tiny_model, texts, tmp_path / f"{world}", world, **options) for world in (1, 3)}
    assert len(list((found[1] / "layers.1").glob("train-*.parquet"))) > 3
    assert contents(found[1]) == contents(found[3])


def test_what_does_not_fit_parts_is_refused(tmp_path, tiny_model, token_data, one):
    with pytest.raises(ConfigError, match="max_tokens counts over all samples"):
        in_parts(tiny_model, token_data, tmp_path / "a", max_tokens=100)
    with pytest.raises(DataError, match="holds other activations: batch_tokens 300 instead of 200"):
        in_parts(tiny_model, token_data, one, batch_tokens=200)
    harvest(tiny_model, token_data[:9], [1, 3], out=tmp_path / "b", **OPTIONS)
    with pytest.raises(DataError, match="holds activations already"):
        in_parts(tiny_model, token_data, tmp_path / "b")
    before = contents(one)
    with pytest.raises(DataError, match="is written in parts"):
        harvest(tiny_model, token_data, [1, 3], out=one, **OPTIONS)
    assert contents(one) == before


def test_finished_parts_of_another_model_or_other_data_are_not_taken(tmp_path, tiny_model, token_data):
    few = [sample for sample in token_data if len(sample["input_ids"]) > 4][:20]
    in_parts(tiny_model, few, tmp_path)
    before = contents(tmp_path)
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    for model, data, options, wrong in (
        (other, few, {}, "weights '"),
        (tiny_model, few + few, {}, "items 20 instead of 40"),  # the last window was smaller
        (tiny_model, few, {"batch_tokens": 200}, "batch_tokens 300 instead of 200"),
        (tiny_model, few, {"dtype": "float32"}, "dtype 'float16' instead of 'float32'"),
        (tiny_model, few, {"scale": 0.5}, "scale .*1.0.* instead of .*0.5"),
    ):
        with pytest.raises(DataError, match=f"holds other activations: .*{wrong}"):
            in_parts(model, data, tmp_path, **options)
    assert contents(in_parts(tiny_model, few, tmp_path)) == before
    (settings,) = tmp_path.glob(".harvest/*/settings")
    settings.unlink()
    with pytest.raises(DataError, match="do not say what they are of"):
        in_parts(tiny_model, few, tmp_path)


def test_finished_parts_of_other_texts_of_the_same_number_are_not_taken(tmp_path, tiny_model, tokenizer, token_data):
    few = [sample for sample in token_data if len(sample["input_ids"]) > 4][:40]
    in_parts(tiny_model, few, tmp_path / "ids")
    changed = [*few[:20], {**few[20], "input_ids": few[20]["input_ids"][::-1]}, *few[21:]]
    before = contents(tmp_path / "ids")
    with pytest.raises(DataError, match="of other texts: part 1 is not of these") as caught:
        in_parts(tiny_model, changed, tmp_path / "ids")
    assert "write into another folder, or remove this one" in caught.value.hint
    assert contents(in_parts(tiny_model, few, tmp_path / "ids", 3)) == before
    # a harvest in one piece and packed texts notice it as well
    harvest(tiny_model, few, [1], out=tmp_path / "whole", **OPTIONS)
    with pytest.raises(DataError, match="holds other activations: first_text"):
        harvest(tiny_model, few[1:], [1], out=tmp_path / "whole", **OPTIONS)
    texts = [f"Ann has {n} apples and eats 3 of them" for n in range(40)]
    options = {"tokenizer": tokenizer, "mode": "packed", "max_length": 16, "window": 8}
    in_parts(tiny_model, texts, tmp_path / "packed", **options)
    with pytest.raises(DataError, match=r"of other texts: part [1-9]"):
        in_parts(tiny_model, [*texts[:30], *reversed(texts[30:])], tmp_path / "packed", **options)


def test_a_conversion_in_parts_writes_the_same_bytes_for_any_number_of_ranks(tmp_path):
    rows = np.arange(3000)
    table = {"x": np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32), "sample_id": rows // 70}
    torch.save({name: torch.from_numpy(column) for name, column in table.items()}, tmp_path / "layer2_train.pt")
    options = {"shard_bytes": 16_000}
    convert(tmp_path / "layer2_train.pt", tmp_path / "one", **options)
    for world in (4, 7):
        for rank in range(world):
            convert(tmp_path / "layer2_train.pt", tmp_path / f"{world}", ranks=Ranks(rank, world), **options)
        assert contents(tmp_path / f"{world}") == contents(tmp_path / "one")
    data = ActivationDataset.open(tmp_path / "one", 2)
    assert len(data.sources) > 4 and np.array_equal(data.read_all().numpy(), table["x"])


def test_a_conversion_in_parts_keeps_no_files_of_another(tmp_path):
    x = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    for name, rows in (("a", x), ("b", x + 1), ("c/a", x[:2000]), ("d/a", x + 1), ("e/a", x)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", rows)
    options = {"config": "layers.2", "shard_bytes": 16_000}
    out = convert(tmp_path / "a.npy", tmp_path / "out", ranks=Ranks(), **options)
    before = contents(out)
    for path, more, wrong in (
        ("b.npy", {}, "converted_from 'a.npy' instead of 'b.npy'"),
        ("a.npy", {"dtype": "float16", "scale": 1}, "dtype 'float32' instead of 'float16'"),
        ("a.npy", {"shard_bytes": 32_000}, "train-00000-00000.parquet of 500 rows instead of 1,000"),
        ("c/a.npy", {}, "train-00004-00000.parquet of 500 rows instead of 0"),
        ("d/a.npy", {}, "a.npy holds other values than when this was begun"),
    ):
        with pytest.raises(DataError, match=f"holds other activations: .*{wrong}"):
            convert(tmp_path / path, out, ranks=Ranks(), **{**options, **more})
    for same in ("a.npy", "e/a.npy"):
        assert contents(convert(tmp_path / same, out, ranks=Ranks(), **options)) == before
