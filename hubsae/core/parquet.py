"""Parquet through pyarrow: the package itself, types by their names, and a table written whole or not at all."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hubsae.core.errors import DataError
from hubsae.core.extras import require
from hubsae.core.files import atomic_path

Type = str | list[Any] | dict[str, Any]
"""A name (`int32`, `string`), `[type]` for a list of it, `{name: type}` for a struct."""


@cache
def arrow() -> Any:
    """pyarrow, with its `parquet`.

    >>> arrow().array([1, 2]).to_pylist()
    [1, 2]
    """
    # pyarrow imports pandas at its first conversion and swallows a Ctrl-C that arrives meanwhile; here it is heard
    with suppress(Exception):
        importlib.import_module("pandas")
    require("pyarrow.parquet", extra="train")
    return require("pyarrow", extra="train")


def arrow_type(kind: Type) -> Any:
    """An Arrow type as it is said in JSON.

    >>> arrow_type([{"token": "string", "value": "float32"}])
    ListType(list<item: struct<token: string, value: float>>)
    """
    pa = arrow()
    if isinstance(kind, list):
        return pa.list_(arrow_type(kind[0]))
    if isinstance(kind, dict):
        return pa.struct({name: arrow_type(inner) for name, inner in kind.items()})
    try:
        return getattr(pa, {"bool": "bool_"}.get(kind, kind))()
    except (TypeError, AttributeError):
        raise DataError(
            f"{kind!r} is no column type", hint="use int32, int64, float32, float64, bool or string"
        ) from None


def table_of(columns: Mapping[str, Any], types: Mapping[str, Type]) -> Any:
    """An Arrow table of the columns that have a type."""
    pa = arrow()
    arrays = [pa.array(columns[name], type=arrow_type(kind)) for name, kind in types.items()]
    return pa.Table.from_arrays(arrays, names=list(types))


def write_table(path: Path, table: Any, **options: Any) -> Path:
    """Write an Arrow table, whole or not at all."""
    with atomic_path(path) as scratch:
        arrow().parquet.write_table(table, scratch, **{"compression": "zstd", **options})
    return path
