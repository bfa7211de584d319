"""What should not be published by mistake: tokens, private keys, environment files.

Every push looks through what it would send: SAEs, activations, feature pages. Of Parquet tables the texts are read, and
tokens of a context joined, since a key that somebody pasted into a chat stands in no other way there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hubsae.core.errors import HubSAEError
from hubsae.core.extras import require
from hubsae.core.parquet import arrow
from hubsae.core.text import printable
from hubsae.hub.contents import LocalFile

WHOLE, HEAD = 8 << 20, 1 << 20
"""Bytes: files up to the first are read whole, of larger ones (weights) the beginning, which holds their header."""
ROWS = 8192
"""Of a Parquet table at once."""
_TEXT = ("string", "binary", "arrow.json")
"""In the name of an Arrow type that holds texts, as such or as bytes, at any depth."""

_NAMES = re.compile(
    r"\.env(\..*)?|.*\.env|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|p12|pfx)|\.?netrc|\.git-credentials", re.I
)
_CONTENTS = (
    ("a Hugging Face token", (b"hf_",), re.compile(rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{20,}")),
    ("a private key", (b"PRIVATE KEY",), re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    (
        "a GitHub token",
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
        re.compile(rb"(?<![A-Za-z0-9_])(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})"),
    ),
    ("an AWS key", (b"AKIA",), re.compile(rb"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}(?![A-Za-z0-9])")),
    ("an API key", (b"sk-",), re.compile(rb"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{32,}")),
)
"""What it is called, a sign that all of its kind hold (looked for first: 50 times as fast as the pattern), and that."""


def secrets_in(files: Iterable[LocalFile]) -> Iterator[tuple[str, str]]:
    """(path, what it looks like) of every file that seems to hold something secret."""
    for file in files:
        if _NAMES.fullmatch(file.path.rpartition("/")[2]):
            yield file.path, "an environment, key or password file"
            continue
        for content in [file.source] if isinstance(file.source, bytes) else _contents(file.source):
            if what := _what(content):
                yield file.path, what
                break


def _what(content: bytes) -> str | None:
    """What a text seems to hold."""
    for what, signs, pattern in _CONTENTS:
        if any(sign in content for sign in signs) and pattern.search(content):
            return what
    return None


def _contents(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield file.read(WHOLE if path.stat().st_size <= WHOLE else HEAD)
    if path.suffix == ".parquet" and find_spec("pyarrow"):
        try:
            with arrow().parquet.ParquetFile(path) as table:
                columns = [field.name for field in table.schema_arrow if _holds_texts(field.type)]
                for batch in table.iter_batches(ROWS, columns=columns) if columns else ():
                    for column in batch.columns:
                        for texts in _texts(column):
                            yield b"\n".join(texts.cast(arrow().large_binary()).unique().drop_null().to_pylist())
        except (arrow().ArrowException, OSError):
            pass  # Parquet by its name only, or damaged


def _holds_texts(kind: Any) -> bool:
    return any(word in str(kind) for word in _TEXT)


def _texts(column: Any) -> Iterator[Any]:
    """The columns of texts in a column, bytes among them; the texts of a list as one."""
    pa, kind = arrow(), column.type
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        yield from _texts(column.storage)
    elif types.is_dictionary(kind):
        yield from _texts(column.dictionary)
    elif types.is_map(kind):
        yield from _texts(column.keys)
        yield from _texts(column.items)
    elif types.is_struct(kind):
        for number in range(kind.num_fields):
            yield from _texts(column.field(number))
    elif hasattr(column, "flatten"):  # a list of any kind
        inner = kind.value_type
        if types.is_nested(inner) or not _holds_texts(inner):
            yield from _texts(column.flatten())
        elif types.is_list(kind) and inner in (pa.string(), pa.binary()) and not column.flatten().null_count:
            yield require("pyarrow.compute", extra="train").binary_join(column, pa.scalar(b"", inner))
        else:  # which the join of Arrow, 20 times as fast, does not take
            yield pa.array([b"".join(map(_bytes, row)) for row in column.to_pylist() if row], pa.large_binary())
    elif _holds_texts(kind):
        yield column


def _bytes(text: str | bytes | None) -> bytes:
    return text.encode() if isinstance(text, str) else text or b""


def refuse_secrets(files: Iterable[LocalFile]) -> None:
    """An error that names what looks secret; the text itself is not repeated."""
    found = [f"{printable(path)} ({what})" for path, what in secrets_in(files)]
    if found:
        raise HubSAEError(
            f"this push would publish what looks like a secret: {', '.join(found)}",
            hint="remove it (and revoke a token that was ever published); if it is none, --allow-secrets "
            "(allow_secrets=True) publishes it",
        )
