"""The activation dataset format: names of files, the Parquet schema, and what a shard says about itself.

    DIR/README.md                               card; its `configs:` make `load_dataset(DIR, "layers.18")` work
    DIR/activations.json                        manifest: source, rows and statistics of every config
    DIR/layers.18/train-00000-00003.parquet     shard 3 written by rank 0
    DIR/layers.18/validation-00000-00000.parquet
    DIR/layers.18/statistics.safetensors        mean, std [d] of the training split, with and without position 0

One row per token: `vector` (fixed-size list of float16 or float32), `token_id`, `position`, `sample_id`, `is_prompt`,
and whatever columns a harvest adds. A shard's footer carries a JSON record under the key `hubsae`: enough to open
the shard alone, to merge statistics, and to refuse a shard that belongs elsewhere. Nothing else is needed to resume:
the finished shards are the journal.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubsae.core.errors import DataError, FormatError
from hubsae.core.parquet import arrow, arrow_type
from hubsae.core.text import natural_key

if TYPE_CHECKING:
    import pyarrow

FORMAT_VERSION = 1
VECTOR = "vector"
LABELS = {"token_id": "int32", "position": "int32", "sample_id": "int64", "is_prompt": "bool"}
"""Label columns every shard has, with their Arrow types."""

TRUNCATED = "truncated"
"""Extra column a harvest with a length limit adds: the sample went on behind the limit."""

PAGE_BYTES = 8 << 20
ROW_GROUP_BYTES = 64 << 20
SHARD_BYTES = 1 << 30
FOOTER_KEY = "hubsae"
MANIFEST, STATISTICS = "activations.json", "statistics.safetensors"
PARTS = ".parts.json"
"""In a config folder that is written in parts: the header that all of them have."""
FP16_MAX = 65504.0

_CONFIG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHARD = re.compile(r"(?P<split>[A-Za-z0-9_]+)-(?P<rank>\d{5})-(?P<index>\d{5})\.parquet")


@dataclass(frozen=True)
class ShardHeader:
    """What every shard of a config has in common, and what makes a shard acceptable beside another."""

    config: str
    d: int
    dtype: str
    scale: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)
    """Extra columns and their Arrow types."""
    source: dict[str, Any] = field(default_factory=dict)
    """Where the rows come from (model, revision, hook point, mode ...); a resumed harvest must agree."""

    def to_json(self) -> dict[str, Any]:
        """For the footer."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ShardHeader:
        """From the footer."""
        return ShardHeader(**{key: data[key] for key in ShardHeader.__dataclass_fields__ if key in data})

    def differences(self, other: ShardHeader) -> list[str]:
        """What differs, in words."""
        found = []
        for name in ("d", "dtype", "scale", "columns"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {theirs!r} instead of {mine!r}")
        for key in sorted(set(self.source) | set(other.source)):
            mine, theirs = self.source.get(key), other.source.get(key)
            if mine != theirs:
                found.append(f"{key} {theirs!r} instead of {mine!r}")
        return found


def config_name(hook: str, stage: str | None = None) -> str:
    """The dataset config of a hook point, for one stage of a chain or alone.

    >>> config_name("layers.18", "ppo_step30")
    'ppo_step30.layers.18'
    """
    return check_config(f"{stage}.{hook}" if stage else hook)


def check_config(name: str) -> str:
    """`name`, if it can be a folder and a dataset config."""
    if not _CONFIG.fullmatch(name) or name.endswith("."):
        raise DataError(
            f"{name!r} cannot name a config of an activation dataset",
            hint="use letters, digits, '.', '_' and '-', such as layers.18 or ppo_step30.layers.18",
        )
    return name


def shard_name(split: str, rank: int, index: int) -> str:
    """File name of a shard."""
    return f"{split}-{rank:05d}-{index:05d}.parquet"


def parse_shard_name(name: str) -> tuple[str, int, int] | None:
    """Split, rank and index of a shard file, or None for another file."""
    match = _SHARD.fullmatch(name)
    return (match["split"], int(match["rank"]), int(match["index"])) if match else None


def shards_in(folder: Path) -> dict[str, list[Path]]:
    """The finished shards of a config folder by split, in reading order."""
    found: dict[str, list[Path]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if (parsed := parse_shard_name(path.name)) and path.is_file():
                found.setdefault(parsed[0], []).append(path)
    return found


def configs_in(root: Path) -> list[str]:
    """The configs of a dataset folder: its subfolders that hold shards, layers in numeric order."""
    if not root.is_dir():
        return []
    names = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and shards_in(p)]
    return sorted(names, key=natural_key)


def arrow_schema(header: ShardHeader) -> pyarrow.Schema:
    """The Arrow schema of a shard. Fields are nullable so that `datasets` reads them without a cast."""
    pa = arrow()
    item = {"float16": pa.float16(), "float32": pa.float32()}[header.dtype]
    fields = [pa.field(VECTOR, pa.list_(item, header.d))]
    fields += [pa.field(n, arrow_type(t)) for n, t in {**LABELS, **header.columns}.items()]
    return pa.schema(fields)


def read_header(path: str, metadata: dict[str, str]) -> tuple[ShardHeader, dict[str, Any]] | None:
    """The header and the whole record of a shard of ours, or None for a Parquet file of other origin."""
    text = metadata.get(FOOTER_KEY)
    if text is None:
        return None
    try:
        record = json.loads(text)
        if int(record["version"]) > FORMAT_VERSION:
            raise FormatError(
                path,
                f"activation format {FORMAT_VERSION} or older",
                f"version {record['version']}",
                hint="update hubsae: pip install -U hubsae",
            )
        return ShardHeader.from_json(record), record
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(path, "a hubsae record in the footer", f"one that does not parse ({error})") from error
