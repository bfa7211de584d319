"""A secret in a compressed Parquet table is found in a column of whatever type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hubsae.hub.contents import LocalFile
from hubsae.hub.secrets import secrets_in

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TOKEN = "hf_" + "k" * 34
PIECES = [TOKEN[:9], TOKEN[9:20], None, TOKEN[20:]]
STRING, LARGE, BINARY = pa.string(), pa.large_string(), pa.binary()
BYTES = TOKEN.encode()
WORDS = pa.dictionary(pa.int32(), pa.string())


def found(path: Path) -> list[tuple[str, str]]:
    return list(secrets_in([LocalFile(path.name, path)]))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (STRING, TOKEN),
        (LARGE, TOKEN),
        (pa.string_view(), TOKEN),
        (pa.json_(), f'{{"a": "{TOKEN}"}}'),
        (WORDS, TOKEN),
        (pa.list_(STRING), PIECES[:2] + PIECES[3:]),
        (pa.list_(STRING), PIECES),
        (pa.list_(LARGE), PIECES),
        (pa.list_(WORDS), PIECES),
        (pa.list_(STRING, 4), PIECES),
        (pa.large_list(STRING), PIECES),
        (pa.large_list(LARGE), PIECES),
        (pa.list_(pa.list_(LARGE)), [["a"], PIECES]),
        (pa.map_(STRING, STRING), [("a", TOKEN)]),
        (pa.map_(STRING, pa.int32()), [(TOKEN, 1)]),
        (pa.map_(STRING, pa.list_(STRING)), [("a", PIECES)]),
        (pa.struct({"a": LARGE}), {"a": TOKEN}),
        (pa.list_(pa.struct({"a": WORDS, "b": pa.int32()})), [{"a": TOKEN, "b": 1}]),
        (BINARY, b"\xff" + BYTES),
        (pa.large_binary(), BYTES),
        (pa.binary_view(), BYTES),
        (pa.binary(len(BYTES)), BYTES),
        (pa.dictionary(pa.int32(), BINARY), BYTES),
        (pa.list_(BINARY), [BYTES[:9], BYTES[9:]]),
        (pa.list_(pa.large_binary()), [BYTES[:9], None, BYTES[9:]]),
        (pa.map_(STRING, BINARY), [("a", BYTES)]),
        (pa.list_(pa.struct({"a": pa.large_binary()})), [{"a": BYTES}]),
    ],
    ids=str,
)
def test_a_token_is_found_in_every_type_of_column(tmp_path: Path, kind: Any, value: Any):
    path = tmp_path / "table.parquet"
    # statistics would hold a text as it is
    pq.write_table(
        pa.table({"x": pa.array([value] * 50 + [None], kind)}), path, compression="zstd", write_statistics=False
    )
    assert TOKEN.encode() not in path.read_bytes()
    assert found(path) == [("table.parquet", "a Hugging Face token")]
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"x": pa.array([None, None], kind)}), plain, compression="zstd", write_statistics=False)
    assert found(plain) == []


def test_a_damaged_table_is_looked_through_as_far_as_it_can_be_read(tmp_path: Path):
    path = tmp_path / "table.parquet"
    pq.write_table(
        pa.table({"x": [f"text {n}" for n in range(5000)]}), path, compression="zstd", write_statistics=False
    )
    data = bytearray(path.read_bytes())
    data[30:2000] = bytes(1970)
    path.write_bytes(data)
    with pytest.raises(OSError):
        pq.read_table(path)
    assert found(path) == []
