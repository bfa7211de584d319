"""A README that a program and a person both write: generated blocks between markers, the rest left alone.

    <!-- hubsae:begin contents 5f1c09ab -->
    ...generated text...
    <!-- hubsae:end contents -->

The hash after the name is that of the generated text, so a block that a person edited is recognised and kept. The
last line of the file remembers which blocks and which front matter were generated: a block that is missing although
it was rendered before was deleted on purpose and stays away, and a front-matter value that is no longer ours stays.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from hubsae.core.errors import MetadataError

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)
_BLOCK = re.compile(
    r"<!-- hubsae:begin (?P<name>[\w-]+) (?P<hash>[0-9a-f]{8}) -->\n(?P<text>.*?)\n?<!-- hubsae:end (?P=name) -->",
    re.S,
)
_MEMORY = re.compile(r"\n*<!-- hubsae:generated (?P<json>\{.*?\}) -->\n*\Z", re.S)


@dataclass
class Readme:
    """A README in its parts."""

    front: dict[str, Any] = field(default_factory=dict)
    body: str = ""
    memory: dict[str, Any] = field(default_factory=dict)
    """What was generated the last time: `blocks` (names) and `front` (values)."""


@dataclass
class Merged:
    """The result of an update, and what was left alone."""

    text: str
    kept_by_hand: list[str] = field(default_factory=list)
    """Blocks that a person edited between the markers; they were not touched."""


def fingerprint(text: str) -> str:
    """Eight hex digits that tell whether a block is still as it was generated."""
    return hashlib.sha256(settled(text).encode()).hexdigest()[:8]


def settled(text: str) -> str:
    """A block's text in the one form that survives editors, line endings and another rendering.

    >>> settled("a  \\r\\n\\r\\n\\r\\nb\\n")
    'a\\n\\nb'
    """
    lines = [line.rstrip() for line in re.split(r"\r\n?|\n", text)]
    # a block cannot hold the marks that blocks are told by
    text = "\n".join(lines).strip().replace("<!-- hubsae:", "&lt;!-- hubsae:")
    return re.sub(r"\n{3,}", "\n\n", text)


def marked(name: str, text: str) -> str:
    """A generated block with its markers.

    >>> print(marked("contents", "3 SAEs"))
    <!-- hubsae:begin contents be8c8e59 -->
    3 SAEs
    <!-- hubsae:end contents -->
    """
    text = settled(text)
    return f"<!-- hubsae:begin {name} {fingerprint(text)} -->\n{text}\n<!-- hubsae:end {name} -->"


def parse(text: str) -> Readme:
    """Split a README into front matter, body and memory."""
    text = re.sub(r"\r\n?", "\n", text)
    front: dict[str, Any] = {}
    found = _FRONT.match(text)
    if found:
        try:
            loaded = yaml.safe_load(found.group(1))
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f" at line {where.line + 2}" if where is not None else ""
            raise MetadataError(
                f"README.md: the front matter is not valid YAML{line}: {getattr(error, 'problem', error)}",
                hint="correct the lines between the two --- at the top",
            ) from error
        if loaded is not None and not isinstance(loaded, dict):
            raise MetadataError(
                f"README.md: the front matter is a {type(loaded).__name__}, expected `key: value` lines",
                hint="correct the lines between the two --- at the top",
            )
        front = loaded or {}
        text = text[found.end() :]
    memory: dict[str, Any] = {}
    remembered = _MEMORY.search(text)
    if remembered:
        try:
            memory = json.loads(remembered.group("json"))
            text = text[: remembered.start()]
        except json.JSONDecodeError:
            pass  # someone edited the line; without it every block counts as new
    return Readme(front, text.strip("\n"), memory)


def compose(readme: Readme) -> str:
    """The README as text."""
    parts = []
    if readme.front:
        dumped = yaml.safe_dump(readme.front, sort_keys=False, allow_unicode=True, width=1000)
        parts.append(f"---\n{dumped}---\n")
    parts.append(readme.body.strip("\n") + "\n")
    if readme.memory:
        remembered = json.dumps(readme.memory, ensure_ascii=False, sort_keys=True).replace("--", "\\u002d\\u002d")
        parts.append(f"<!-- hubsae:generated {remembered} -->\n")
    return "\n".join(parts)


def update(existing: str | None, front: dict[str, Any], blocks: dict[str, str], *, force: bool = False) -> Merged:
    """Put freshly rendered front matter and blocks (in order) into an existing README, or into a new one.

    >>> first = update(None, {"license": "mit"}, {"summary": "2 SAEs", "loading": "code"}).text
    >>> mine = first.replace("<!-- hubsae:begin loading", "My own words.\\n\\n<!-- hubsae:begin loading")
    >>> again = update(mine, {"license": "mit"}, {"summary": "3 SAEs", "loading": "code"}).text
    >>> "My own words." in again, "3 SAEs" in again, "2 SAEs" in again
    (True, True, False)
    """
    old = parse(existing or "")
    merged_front = _merge_front(old, front)
    body, kept = old.body, []
    present = {found["name"]: found for found in _BLOCK.finditer(body)}
    known = set(old.memory.get("blocks", []))
    anchor: str | None = None
    for name, text in blocks.items():
        fresh = marked(name, text)
        if name in present:
            found = present[name]
            if fingerprint(found["text"]) == found["hash"] or force:
                body = _replace(body, name, fresh)
            elif fingerprint(found["text"]) != fingerprint(text):
                kept.append(name)
            anchor = name
        elif name not in known:
            body = _insert_after(body, anchor, fresh)
            anchor = name
    for name in [n for n in present if n not in blocks]:
        # a block that has nothing to say any more, e.g. results whose file is gone
        found = present[name]
        if fingerprint(found["text"]) == found["hash"]:
            body = re.sub(r"\n{3,}", "\n\n", _replace(body, name, ""))
    memory = {"blocks": sorted(known | set(blocks)), "front": front}
    return Merged(compose(Readme(merged_front, body, memory)), kept)


def _replace(body: str, name: str, fresh: str) -> str:
    return _BLOCK.sub(lambda m: fresh if m["name"] == name else m[0], body)


def _insert_after(body: str, anchor: str | None, fresh: str) -> str:
    end = f"<!-- hubsae:end {anchor} -->"
    if anchor is not None and end in body:
        head, _, tail = body.partition(end)
        return f"{head}{end}\n\n{fresh}\n{tail}"
    return f"{body}\n\n{fresh}" if body.strip() else fresh


def _merge_front(old: Readme, fresh: dict[str, Any]) -> dict[str, Any]:
    ours = old.memory.get("front", {})
    merged: dict[str, Any] = {}
    for key, value in fresh.items():
        if key not in old.front:
            if key in ours:
                continue  # deleted by a person
            merged[key] = value
        elif isinstance(value, list):
            held = old.front[key] if isinstance(old.front[key], list) else [old.front[key]]
            before = ours.get(key) if isinstance(ours.get(key), list) else []
            theirs = [item for item in held if item not in before]
            deleted = [item for item in before if item not in held]
            merged[key] = [item for item in value if item not in deleted]
            merged[key] += [item for item in theirs if item not in merged[key]]
        elif key == "library_name" or old.front[key] == ours.get(key):
            merged[key] = value
        else:
            merged[key] = old.front[key]
    for key, value in old.front.items():
        # what we generated once and no longer do goes; what a person added stays
        if key not in merged and key not in fresh and ours.get(key) != value:
            merged[key] = value
    return merged
