"""What a push is about to do, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from hubsae.core.fingerprint import FILE_NAME as FINGERPRINT
from hubsae.core.text import format_bytes, printable
from hubsae.hub import upload
from hubsae.hub.cardtext import listing
from hubsae.hub.client import HubClient
from hubsae.hub.contents import Diff, State
from hubsae.hub.trial import Verification, summarize


@dataclass
class PlanRow:
    """One SAE in the plan."""

    id: str
    read_as: str
    selection: str
    shape: str
    size: int
    check: Verification
    scope: str = "all"
    """The tokens that it is for."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of its record over those tokens."""
    on_hub: str = ""
    """`new`, `changed` or `same`."""


@dataclass
class Target:
    """The repo that is published to, as it was found before any work was done."""

    repo_id: str
    revision: str
    tag: str | None
    pr: bool
    private: bool | None
    exists: bool = True
    branch: str = "main"
    """Where the plan is compared: the branch asked for, or main where that is new."""
    notes: list[str] = field(default_factory=list)

    def look(self, client: HubClient) -> State:
        """The state of its branch now."""
        return upload.look(client, self.repo_id, self.branch) if self.exists else State("", {})


@dataclass
class PushPlan:
    """What a push is about to do."""

    target: Target
    rows: list[PlanRow]
    kept: list[str]
    diff: Diff
    notes: list[str] = field(default_factory=list)
    endpoint: str = ""
    others: list[tuple[str, int]] = field(default_factory=list)
    """Path and size of every file that belongs to no SAE, the card and the manifest excepted."""

    @property
    def repo_id(self) -> str:
        """Where to."""
        return self.target.repo_id

    def summary(self) -> list[str]:
        """The plan in a few lines, as shown above and below the table."""
        to = self.target
        place = f"{self.endpoint}/{to.repo_id}" + (f" (branch {to.revision})" if to.revision != "main" else "")
        lines = [f"to {place}" + ("" if to.exists else f", a new {'private' if to.private else 'public'} repo")]
        diff = self.diff
        parts = [
            f"{len(files)} {what} ({format_bytes(sum(f.size for f in files))})"
            for what, files in (("new", diff.new), ("changed", diff.changed), ("unchanged", diff.unchanged))
            if files
        ]
        if diff.deleted:
            parts.append(f"{len(diff.deleted)} deleted")
        lines.append("files: " + ", ".join(parts))
        if self.others:
            lines.append("beside the SAEs: " + ", ".join(f"{printable(p)} ({format_bytes(n)})" for p, n in self.others))
        if self.kept:
            count = f"{len(self.kept)} SAE{'s' if len(self.kept) > 1 else ''}"
            lines.append(f"kept as they are: {count} of the repo ({listing(self.kept, 4)})")
        if diff.deleted:
            lines.append(f"deleted: {listing(diff.deleted, 6)}")
        if any(row.metrics for row in self.rows):
            scopes = listing(list(dict.fromkeys(row.scope for row in self.rows)), 4)
            lines.append(f"metrics: as recorded, over the tokens that the SAEs are for ({scopes})")
        every = [*diff.new, *diff.changed, *diff.unchanged]
        kept = sum(file.path.endswith(FINGERPRINT) for file in every)
        without = "; hubsae check RELEASE --model MODEL --take adds them" if kept < len(self.rows) else ""
        lines.append(f"fingerprints to check a model with: {kept} of {len(self.rows)}{without}")
        lines.append("checked: " + summarize([row.check for row in self.rows]))
        if diff.empty:
            lines.append("the Hub already has all of it: no commit will be made")
        else:
            lines.append("as one " + ("pull request" if to.pr else "commit") + (f", tagged {to.tag}" if to.tag else ""))
        return lines


@dataclass
class PushResult:
    """What a push did."""

    plan: PushPlan
    published: upload.Published | None
    """None after a dry run, or when the plan was declined."""

    @property
    def tag(self) -> str | None:
        """The tag that was set."""
        return self.plan.target.tag if self.published else None

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
