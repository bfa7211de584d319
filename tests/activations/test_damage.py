"""Damaged and foreign files give an error that names the file and what is wrong with it - never wrong numbers."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hubsae.activations import ActivationDataset, ActivationWriter
from hubsae.core.errors import DataError, FormatError, HubSAEError


def shard(out):
    return sorted((out / "layers.6").glob("*.parquet"))[0]


def flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_flipped_byte_in_the_values_is_found_by_verification(written):
    out, _ = written()
    path = shard(out)
    data = ActivationDataset.open(out)
    assert data.verify() == len(data.sources[0].blocks)
    page = data.sources[0].pages[0]
    flip(path, page.offset + page.size - 100)
    with pytest.raises(FormatError, match=rf"{path.name}: expected checksum [0-9a-f]+ for rows 0 to 2999, found"):
        ActivationDataset.open(out).verify()
    with pytest.raises(FormatError, match="checksum"):
        next(iter(ActivationDataset.open(out, verify=True).batches(100)))


def test_a_flipped_byte_in_the_labels_is_found_by_verification(written):
    out, _ = written()
    path = shard(out)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    flip(path, chunk.data_page_offset + chunk.total_compressed_size - 8)
    with pytest.raises(FormatError, match="readable row group 0"):
        ActivationDataset.open(out).verify()


def test_no_flipped_byte_goes_unnoticed(written):
    """One bit anywhere in the file: an error, or data that is still right."""
    out, _ = written(rows=300, d=4)
    path = shard(out)
    good = path.read_bytes()
    reference = ActivationDataset.open(out)
    values, labels = reference.read_all(), reference.columns()
    rng = np.random.default_rng(0)
    unharmed = 0
    for place in [*range(60), *rng.integers(0, len(good), 250).tolist(), *range(len(good) - 60, len(good))]:
        path.write_bytes(good)
        flip(path, place)
        try:
            data = ActivationDataset.open(out, verify=True)
            data.verify()
            assert torch.equal(data.read_all(), values), place
            assert all(np.array_equal(v, labels[k]) for k, v in data.columns().items()), place
            unharmed += 1
        except HubSAEError as error:
            assert path.name in str(error)
    assert unharmed < 150  # bits of metadata nobody reads


@pytest.mark.parametrize("keep", [0, 5, 11, 1000, -1, -9, -400])
def test_a_truncated_file(written, keep):
    out, _ = written()
    path = shard(out)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=rf"{path.name}(.|\n)*truncated or damaged"):
        ActivationDataset.open(out)


def test_shards_of_another_schema_or_origin_are_refused(tmp_path, written):
    out, _ = written()
    with ActivationWriter(tmp_path / "other", d=8, config="layers.6") as writer:
        writer.write(torch.ones(4, 8))
    shutil.copy(shard(tmp_path / "other"), out / "layers.6" / "train-00001-00000.parquet")
    with pytest.raises(DataError, match=r"train-00001-00000.parquet does not belong(.|\n)*vectors of 8"):
        ActivationDataset.open(out)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(64, np.float16)), 16)
    pq.write_table(pa.table({"vector": vectors}), out / "layers.6" / "train-00001-00000.parquet")
    with pytest.raises(DataError, match=r"train-00001-00000.parquet has a schema from elsewhere"):
        ActivationDataset.open(out)
    pq.write_table(pa.table({"text": ["a"]}), out / "layers.6" / "train-00001-00000.parquet")
    with pytest.raises(DataError, match=r"no column 'vector'(.|\n)*text"):
        ActivationDataset.open(out)


def test_the_same_name_from_another_model_is_refused(tmp_path):
    for name, model in (("a", "one"), ("b", "two")):
        with ActivationWriter(tmp_path / name, d=4, config="layers.6", source={"model": model}) as writer:
            writer.write(torch.ones(4, 4), sample_id=0)
    shutil.copy(shard(tmp_path / "b"), tmp_path / "a" / "layers.6" / "train-00001-00000.parquet")
    with pytest.raises(DataError, match="model 'two' instead of 'one'"):
        ActivationDataset.open(tmp_path / "a")


def test_a_version_from_the_future(written):
    out, _ = written()
    path = shard(out)
    data = path.read_bytes()
    assert data.count(b'"version": 1,') == 1
    path.write_bytes(data.replace(b'"version": 1,', b'"version": 9,'))
    with pytest.raises(FormatError, match="version 9"):
        ActivationDataset.open(out)


def test_missing_vectors_are_refused(tmp_path):
    kind = pa.list_(pa.float32(), 4)
    table = pa.table({"vector": pa.array([[1, 2, 3, 4], None, [1, 2, 3, 4]], type=kind)})
    options = {"compression": "none", "use_dictionary": False, "write_page_index": True}
    pq.write_table(table, tmp_path / "a.parquet", **options)
    data = ActivationDataset.open(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="missing values"):
        data.read_all()
