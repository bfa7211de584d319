"""`push`: a folder of SAE files, or a packaged release, becomes a release on the Hub. Plan, verify, upload.

package   a raw folder is packaged into a staging folder; a release folder is taken as it is
verify    each SAE is read back and compared with its source; stock SAELens is tried on it
plan      what is new, changed, unchanged, deleted and kept on the Hub (`dry_run=True` ends here)
publish   one commit (see `upload`), then the tag
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubsae.core.errors import HubSAEError
from hubsae.core.metadata import Metadata
from hubsae.formats.manifest import Manifest
from hubsae.formats.release import Release as PackagedRelease
from hubsae.hub import cardtext, upload
from hubsae.hub.client import HubClient
from hubsae.hub.errors import AccessError, OfflineError, RepoNotFoundError, RevisionNotFoundError
from hubsae.hub.merge import CardOptions, Merge, Release, open_release, pickles
from hubsae.hub.plan import PlanRow, PushOptions, PushPlan, PushResult, datasets_of, options_of
from hubsae.hub.probes import Activations, check, have_saelens
from hubsae.hub.staging import Staging, calibrate_all, one_place, staged, staging_folder

if TYPE_CHECKING:
    from hubsae.core.sae import SAE

NOTHING_THERE = upload.State("", {})


def push(
    source: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    confirm: Callable[[PushPlan], bool] | None = None,
    notify: Callable[[str], None] | None = None,
    bar: bool | None = None,
    **options: Any,
) -> PushResult:
    """Publish a folder of SAE files, a single file, a packaged release or a recipe's run folder.

    `repo_id` is `<you>/<folder>` unless given. For the options see `PushOptions` (docs/publishing.md explains them).
    `confirm` is shown the plan and may decline; `notify` gets one line for whatever happens on the way.

    >>> push("saes_k64/", "me/my-saes", dry_run=True).plan.summary()      # doctest: +SKIP
    ['to https://huggingface.co/me/my-saes, a new public repo', ...]
    """
    told = options_of(options)
    client = HubClient(token, endpoint or "", notify=notify)
    if not Path(source).expanduser().exists():
        raise HubSAEError(
            f"there is no folder or file {source}",
            hint="push takes a folder of SAE files, a release folder or one file",
        )
    target = _target(client, _repo_id(client, repo_id, Path(source)), told)
    with staged(client, Path(source), told) as staging:
        return _push(client, staging, target, told, confirm, bar)


def push_sae(sae: SAE, repo_id: str, *, id: str = ".", **options: Any) -> PushResult:
    """Publish one SAE; at the root of its repo, unless an `id` (a folder) is given."""
    told = options_of({k: v for k, v in options.items() if k not in _CALL})
    call = {k: v for k, v in options.items() if k in _CALL}
    client = HubClient(call.get("token"), call.get("endpoint") or "", notify=call.get("notify"))
    with staging_folder() as folder:
        fields = {"license": told.license, "description": told.description, "datasets": datasets_of(told)}
        release = PackagedRelease.create(
            folder / "release",
            name=repo_id.rpartition("/")[2],
            base_model=told.base_model or sae.metadata.base_model.id,
            **{name: value for name, value in fields.items() if value},
        )
        release.add(sae, id, also=told.also)
        staging = Staging(release.path, {id: lambda: sae}, {id: sae.metadata.provenance.source_format or "HubSAE"})
        calibrate_all(staging, told)
        target = _target(client, _repo_id(client, repo_id, folder), told)
        return _push(client, staging, target, told, call.get("confirm"), call.get("bar"))


_CALL = ("token", "endpoint", "confirm", "notify", "bar")


# -- verify, plan, publish ---------------------------------------------------------------------------------------


def _push(
    client: HubClient,
    staging: Staging,
    target: Target,
    told: PushOptions,
    confirm: Callable[[PushPlan], bool] | None,
    bar: bool | None,
) -> PushResult:
    release = open_release(staging.root)
    rows = list(_verified(client, staging, release, told))
    revision = told.revision or "main"
    repo_id, state, exists, notes = target.repo_id, target.look(client), target.exists, target.notes
    fields: dict[str, Any] = {"title": told.title, "citation": told.citation}
    if told.limitations:
        fields["limitations"] = list(told.limitations)
    card = CardOptions(told.card_template, told.card_kind, told.force_card, fields)
    merge = Merge(client, repo_id, release, card, told.prune, told.delete, told.overwrite_config)
    contents = merge(state)
    diff = upload.compare(contents, state.tree)
    _mark(rows, release.manifest, diff)
    plan = PushPlan(
        repo_id, revision, exists, told.private, told.pr, told.tag, rows, merge.kept, diff,
        [*staging.notes, *notes, *merge.notes, *_row_notes(rows, staging), *_file_notes(release)], client.endpoint,
    )  # fmt: skip
    if told.tag and exists:
        _check_tag(client, repo_id, told.tag, state, diff)
    if told.dry_run or (confirm is not None and not confirm(plan)):
        return PushResult(plan, None)
    if not exists:
        repo_id = merge.repo_id = client.ensure_repo(repo_id, private=told.private)
    if revision != "main" and not told.pr:
        client.ensure_branch(repo_id, revision)
    message = told.message or _message(release.manifest)
    published = upload.publish(client, repo_id, merge, message=message, revision=revision, pr=told.pr, bar=bar)
    if told.tag:
        client.ensure_tag(repo_id, told.tag, published.commit)
    return PushResult(plan, published, told.tag)


def _verified(client: HubClient, staging: Staging, release: Release, told: PushOptions) -> Iterator[PlanRow]:
    given = Activations(told.activations) if told.activations is not None else None
    only = one_place(release.manifest)
    total = len(release.manifest)
    step = max(1, total // 10)
    if told.check_saelens and have_saelens() and total:
        client.say("checking that stock SAELens computes the same (importing it takes a while)")
    for number, entry in enumerate(release.manifest):
        if total > 10 and number % step == 0:
            client.say(f"checking {number + 1} of {total}: {entry.id}")
        source = staging.sources.get(entry.id)
        folder = staging.root if entry.path == "." else staging.root / entry.path
        vectors = given.of(entry.layer, entry.stage, only_place=only) if given is not None else None
        found = check(
            entry.id,
            folder,
            source() if source is not None else None,
            activations=vectors,
            with_saelens=told.check_saelens,
        )
        if entry.id in staging.calibrations:
            found.notes.append(str(staging.calibrations[entry.id]))
        record = Metadata.load(folder)
        read_as = staging.read_as.get(entry.id) or record.provenance.source_format or "hubsae"
        shape = f"{entry.d_in} x {entry.d_sae}"
        yield PlanRow(entry.id, read_as, record.config.selection, shape, sum(f.size for f in entry.files), found)


@dataclass
class Target:
    """The repo that is published to, as it was found before any work was done."""

    repo_id: str
    branch: str
    """Where the plan is compared: the branch asked for, or main where that is new."""
    exists: bool
    notes: list[str] = field(default_factory=list)

    def look(self, client: HubClient) -> upload.State:
        """The state of its branch now."""
        return upload.look(client, self.repo_id, self.branch) if self.exists else NOTHING_THERE


def _target(client: HubClient, repo_id: str, told: PushOptions) -> Target:
    """Look the repo up first: a wrong name or token should not cost the time of packaging and checking."""
    if client.offline:
        raise OfflineError(
            f"publishing to {repo_id} needs the Hub, which is not asked (offline)", hint="unset HF_HUB_OFFLINE"
        )
    try:
        info = client.info(repo_id)
    except RepoNotFoundError:
        if told.pr:
            raise
        if not told.dry_run:
            _check_namespace(client, repo_id)
        return Target(repo_id, "main", False)
    target = Target(repo_id, told.revision or "main", True)
    if info.id.lower() != repo_id.lower():
        target.notes.append(f"{repo_id} is now called {info.id}; publishing there")
        target.repo_id = info.id
    if told.private is not None and bool(info.private) != told.private:
        visibility = "private" if info.private else "public"
        target.notes.append(f"{info.id} is {visibility} and stays so (change it in the repo's settings)")
    try:
        client.head(target.repo_id, target.branch)
    except RevisionNotFoundError:
        if told.pr:
            raise
        target.notes.append(f"branch {target.branch} is new and will start from main")
        target.branch = "main"
    return target


def _check_namespace(client: HubClient, repo_id: str) -> None:
    """A new repo needs a token, and a namespace that is ours."""
    namespace = repo_id.partition("/")[0]
    mine = client.namespaces()
    if namespace.lower() not in {name.lower() for name in mine}:
        raise AccessError(
            f"you are logged in as {mine[0]!r} and cannot create {repo_id}",
            hint=f"namespaces you can create repos in: {', '.join(mine)}",
        )


def _mark(rows: list[PlanRow], manifest: Manifest, diff: upload.Diff) -> None:
    """Say for each SAE whether the Hub has it."""
    new, changed = {f.path for f in diff.new}, {f.path for f in diff.changed}
    for row, entry in zip(rows, manifest, strict=True):
        paths = {file.path for file in entry.files}
        row.on_hub = "new" if paths <= new else "changed" if paths & (new | changed) else "same"


def _row_notes(rows: list[PlanRow], staging: Staging) -> list[str]:
    """Notes on single SAEs; one that holds for many is said once."""
    said: dict[str, list[str]] = {}
    for row in rows:
        for note in row.check.notes:
            said.setdefault(note, []).append(row.id)
    lines = []
    for note, ids in said.items():
        every = len(ids) == len(rows)
        who = ids[0] if len(ids) == 1 else f"all {len(ids)} SAEs" if every else f"SAEs {cardtext.listing(ids, 3)}"
        lines.append(f"{who}: {note}")
    return lines


def _file_notes(release: Release) -> list[str]:
    found = pickles(release.files)
    if not found:
        return []
    return [
        f"{len(found)} pickle file{'s' if len(found) > 1 else ''} will be shipped too ({cardtext.listing(found, 3)})"
    ]


def _check_tag(client: HubClient, repo_id: str, tag: str, state: upload.State, diff: upload.Diff) -> None:
    """A tag that exists already must already mean exactly this; better to say so before the upload."""
    at = client.tags(repo_id).get(tag)
    if at is None or (diff.empty and at == state.head):
        return
    raise HubSAEError(
        f"{repo_id} has a tag {tag!r} already, on commit {at[:10]}, and this release differs from it",
        hint=f"use another tag, or delete the old one: hf repo tag delete {repo_id} {tag}",
    )


def _message(manifest: Manifest) -> str:
    count = len(manifest)
    return f"Publish {count} SAE{'s' if count != 1 else ''}" + (f" ({manifest.name})" if manifest.name else "")


def _repo_id(client: HubClient, repo_id: str | None, source: Path) -> str:
    if repo_id is not None and "@" in repo_id:
        raise HubSAEError(f"{repo_id!r}: a push goes to a branch", hint="give it as revision= (--revision)")
    if repo_id is not None and "/" in repo_id:
        return repo_id
    name = repo_id or source.expanduser().resolve().name.removesuffix(".safetensors").removesuffix(".pt")
    return f"{client.whoami()}/{name}"
