"""What a push is told, what it is about to do, and what it did."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hubsae.core.errors import ConfigError, nearest
from hubsae.hub import cardtext, upload
from hubsae.hub.probes import Check, summarize


@dataclass
class PushOptions:
    """Everything a push can be told; the keyword arguments of `push`."""

    revision: str | None = None
    tag: str | None = None
    pr: bool = False
    private: bool | None = None
    message: str | None = None
    dry_run: bool = False
    prune: bool = False
    delete: Sequence[str] = ()
    overwrite_config: bool = False
    card_template: str | os.PathLike[str] | None = None
    card_kind: str | None = None
    force_card: bool = False
    title: str | None = None
    citation: str | None = None
    limitations: Sequence[str] | None = None
    license: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    hook: str | None = None
    dataset: str | Sequence[str] | None = None
    description: str | None = None
    pattern: str | None = None
    format: str | None = None
    choices: dict[str, Any] | None = None
    mixed_widths: bool | None = None
    activations: Any = None
    also: Sequence[str] = ()
    keep_source: bool = False
    check_saelens: bool = True


@dataclass
class PlanRow:
    """One SAE in the plan."""

    id: str
    read_as: str
    selection: str
    shape: str
    size: int
    check: Check
    on_hub: str = ""
    """`new`, `changed` or `same`."""


@dataclass
class PushPlan:
    """What a push is about to do."""

    repo_id: str
    revision: str
    exists: bool
    private: bool | None
    pr: bool
    tag: str | None
    rows: list[PlanRow]
    kept: list[str]
    diff: upload.Diff
    notes: list[str] = field(default_factory=list)
    endpoint: str = ""

    def summary(self) -> list[str]:
        """The plan in a few lines, as shown above and below the table."""
        visibility = {True: "private", False: "public", None: "public"}[self.private]
        target = f"{self.endpoint}/{self.repo_id}" + (f" (branch {self.revision})" if self.revision != "main" else "")
        lines = [f"to {target}" + ("" if self.exists else f", a new {visibility} repo")]
        diff = self.diff
        parts = [
            f"{len(files)} {what} ({cardtext.human_bytes(sum(f.size for f in files))})"
            for what, files in (("new", diff.new), ("changed", diff.changed), ("unchanged", diff.unchanged))
            if files
        ]
        if diff.deleted:
            parts.append(f"{len(diff.deleted)} deleted")
        lines.append("files: " + ", ".join(parts))
        if self.kept:
            count = f"{len(self.kept)} SAE{'s' if len(self.kept) > 1 else ''}"
            lines.append(f"kept as they are: {count} of the repo ({cardtext.listing(self.kept, 4)})")
        if diff.deleted:
            lines.append(f"deleted: {cardtext.listing(diff.deleted, 6)}")
        lines.append("checked: " + summarize([row.check for row in self.rows]))
        if diff.empty:
            lines.append("the Hub already has all of it: no commit will be made")
        else:
            lines.append(
                "as one " + ("pull request" if self.pr else "commit") + (f", tagged {self.tag}" if self.tag else "")
            )
        return lines


@dataclass
class PushResult:
    """What a push did."""

    plan: PushPlan
    published: upload.Published | None
    """None after a dry run, or when the plan was declined."""
    tag: str | None = None

    @property
    def url(self) -> str | None:
        """Page of the release, or of the pull request."""
        return self.published.url if self.published else None

    @property
    def commit(self) -> str | None:
        """The commit that holds the release."""
        return self.published.commit if self.published else None

    @property
    def committed(self) -> bool:
        """Whether a commit was made; an unchanged push makes none."""
        return self.published is not None and self.published.committed


def options_of(given: dict[str, Any]) -> PushOptions:
    """Check the names of what was given."""
    known = list(PushOptions.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"push has no option {name!r}", hint=f"nearest: {nearest(name, known)}; all: {', '.join(known)}"
            )
    return PushOptions(**given)


def datasets_of(told: PushOptions) -> list[str]:
    """The datasets named, as a list."""
    return [told.dataset] if isinstance(told.dataset, str) else list(told.dataset or [])
