"""`push`: SAE files, or a packaged release, become a release on the Hub. Plan, verify, upload.

package   a raw folder is packaged into a staging folder; a release folder is taken as it is
verify    each SAE is read back and compared with its source; stock SAELens is tried on it
plan      what is new, changed, unchanged, deleted and kept on the Hub (`dry_run=True` ends here)
publish   one commit (see `upload`), then the tag
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hubsae.core.errors import HubSAEError
from hubsae.core.options import named_options
from hubsae.core.progress import progress
from hubsae.core.sae import SAE
from hubsae.formats import native
from hubsae.formats.manifest import Manifest
from hubsae.formats.spec import PackageSpec
from hubsae.hub import upload
from hubsae.hub.card import CardOptions
from hubsae.hub.cardtext import listing
from hubsae.hub.client import HubClient, split_repo, tag_is_taken
from hubsae.hub.contents import Diff, LocalFile, State, compare
from hubsae.hub.errors import AccessError, OfflineError, RevisionNotFoundError
from hubsae.hub.merge import Merge, files_of
from hubsae.hub.plan import PlanRow, PushPlan, PushResult, Target
from hubsae.hub.secrets import refuse_secrets
from hubsae.hub.staging import Extras, Staging, check_source, on_the_hub, one_place, staged
from hubsae.hub.trial import Activations, have_saelens, verify

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
"""What the Hub's page will warn about."""


@named_options
def push(
    source: str | os.PathLike[str] | SAE,
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    tag: str | None = None,
    pr: bool = False,
    private: bool | None = None,
    message: str | None = None,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    hook: str | None = None,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    description: str | None = None,
    pattern: str | None = None,
    format: str | None = None,
    choices: Mapping[str, Any] | None = None,
    mixed_widths: bool | None = None,
    id: str | None = None,
    activations: str | os.PathLike[str] | Tensor | None = None,
    also: Sequence[str] = (),
    keep_source: bool = False,
    prune: bool = False,
    delete: Sequence[str] = (),
    overwrite_config: bool = False,
    title: str | None = None,
    citation: str | None = None,
    limitations: Sequence[str] | None = None,
    card_template: str | os.PathLike[str] | None = None,
    card_kind: str | None = None,
    force_card: bool = False,
    check_saelens: bool = True,
    allow_secrets: bool = False,
    dry_run: bool = False,
    confirm: Callable[[PushPlan], bool] | None = None,
    notify: Callable[[str], None] | None = None,
    bar: bool | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> PushResult:
    """Publish SAEs on the Hub, in one commit or not at all; an interrupted push is completed by the next.

    >>> push("saes_k64/", "me/my-saes", dry_run=True).plan.summary()      # doctest: +SKIP
    ['to https://huggingface.co/me/my-saes, a new public repo', ...]

    What, and where to:
        source: a folder of SAE files, one file, a release folder, a recipe's run folder, an SAE, or `OWNER/NAME` of a
            repo on the Hub whose pile of files is to become a release.
        repo_id: `name/repo`; `<you>/<folder>` unless given, for a repo on the Hub that repo.
        revision: branch to publish on; made if missing.
        tag: tag for the release, such as `v1.0`; never moved.
        pr: open a pull request against main instead of committing.
        private: visibility of a new repo.
        message: title of the commit.
    About the SAEs (the fields of `hubsae.yaml`, over which they win):
        base_model, base_model_revision: id of the language model, and its commit.
        hook: where the SAEs read, such as `model.layers.{layer}`.
        license, datasets, description: of the release.
        pattern: naming scheme of the files, such as `{stage}_L{layer}_k{k}.pt`.
        format: read every file as this format.
        choices: for the readers, against what they would decide, such as `{"topk_relu": True}`.
        mixed_widths: allow SAEs of different input width in one release.
        id: name of a single live SAE; it lies at the root of its repo unless given.
        activations: a tensor, file or dataset to check quality on and to find BatchTopK thresholds with.
        also: further formats beside each SAE: sparsify, onnx, pt, raw.
        keep_source: ship the original files too.
    What is there already:
        prune: delete SAEs of the repo that are not in this release.
        delete: patterns of files of the repo to delete in the same commit, such as `*.pt`.
        overwrite_config: replace a `config.json` that is no release manifest.
    The card:
        title, citation, limitations: words of yours.
        card_template: a template of your own (.md.j2).
        card_kind: single, chain, grid or release; seen from the SAEs unless given.
        force_card: replace generated blocks even where they were edited by hand.
    How:
        check_saelens: compare with stock SAELens, if it is installed.
        allow_secrets: publish files that look like tokens, private keys or environment files.
        dry_run: only plan.
        confirm: is shown the plan and may decline.
        notify: gets one line for whatever happens on the way.
        bar: a progress bar; where standard error is a terminal unless said.
        token, endpoint: as for every tool of the Hub.
    """
    check_source(source)
    client = HubClient(token, endpoint or "", notify=notify)
    target = Target(_repo_id(client, repo_id, source), revision or "main", tag, pr, private)
    _look_up(client, target, dry_run)
    # activations are here those to check on, not what the record says of them
    asked = PackageSpec.of(locals(), activations=None, datasets=datasets or None, choices=choices or None)
    card = CardOptions(card_template, card_kind, force_card, title, citation, limitations)
    with staged(client, source, target.repo_id, asked, Extras(id, also, keep_source, activations, bar)) as staging:
        files = files_of(staging.release, hashes=not staging.fresh)
        merge = Merge(client, target.repo_id, staging.release, files, card, prune, delete, overwrite_config)
        rows = _verified(client, staging, merge, activations, check_saelens, bar)
        plan = _planned(client, target, staging, merge, rows)
        if not allow_secrets:
            refuse_secrets(plan.diff.sent)
        if dry_run or (confirm is not None and not confirm(plan)):
            return PushResult(plan, None)
        if not target.exists:
            merge.repo_id = client.ensure_repo(target.repo_id, private=private)
        published = upload.publish(
            client, merge.repo_id, merge, message=message or _message(staging.release.manifest),
            revision=target.revision, pr=pr, bar=bar,
        )  # fmt: skip
        if tag:
            client.ensure_tag(merge.repo_id, tag, published.commit)
        return PushResult(plan, published)


# -- verify and plan ---------------------------------------------------------------------------------------------


def _verified(
    client: HubClient, staging: Staging, merge: Merge, activations: Any, check_saelens: bool, bar: bool | None
) -> list[PlanRow]:
    release = staging.release
    given = Activations(activations) if activations is not None else None
    only = one_place(release.manifest)
    if check_saelens and have_saelens() and len(release):
        client.say("checking that stock SAELens computes the same (importing it takes a while)")
    rows = []
    with progress("checking", len(release), "SAEs", show=bar) as task:
        for entry in release:
            source, folder = staging.sources.get(entry.id), release.folder(entry)
            written = native.read(folder)
            record = merge.records[entry.path] = written.metadata
            found = verify(
                entry.id,
                folder,
                written,
                source() if source is not None else None,
                activations=given.of(record, only_place=only) if given is not None else None,
                with_saelens=check_saelens,
            )
            if entry.id in staging.calibrations:
                found.notes.append(str(staging.calibrations[entry.id]))
            read_as = staging.read_as.get(entry.id) or record.provenance.source_format or "hubsae"
            widths = [n for n in (entry.d_in, entry.d_sae, record.config.d_out) if n is not None]
            size = sum(file.size for file in entry.files)
            metrics = {metric.name: metric.value for metric in record.own_metrics}
            shape, scope = " x ".join(map(str, widths)), record.own_scope
            rows.append(PlanRow(entry.id, read_as, record.config.selection, shape, size, found, scope, metrics))
            task.advance()
    return rows


def _planned(client: HubClient, target: Target, staging: Staging, merge: Merge, rows: list[PlanRow]) -> PushPlan:
    """Compare the release with what is on the Hub."""
    state = target.look(client)
    diff = compare(merge(state), state.tree)
    _mark(rows, staging.release.manifest, diff)
    notes = [*staging.notes, *target.notes, *merge.notes, *_row_notes(rows), *_file_notes(merge.files)]
    if target.tag and target.exists:
        _check_tag(client, target.repo_id, target.tag, state, diff)
    others = [(f.path, f.size) for f in staging.release.manifest.files]
    return PushPlan(target, rows, merge.kept, diff, notes, client.address, others)


def _look_up(client: HubClient, target: Target, dry_run: bool) -> None:
    """Look the repo up first: a wrong name or token should not cost the time of packaging and checking."""
    repo_id = target.repo_id
    if client.offline:
        raise OfflineError(
            f"publishing to {repo_id} needs the Hub, which is not asked (offline)", hint="unset HF_HUB_OFFLINE"
        )
    info = client.info(repo_id) if target.pr else client.find(repo_id)
    if info is None:
        if not dry_run:
            _check_namespace(client, repo_id)
        target.exists = False
        return
    if info.id.lower() != repo_id.lower():
        target.notes.append(f"{repo_id} is now called {info.id}; publishing there")
        target.repo_id = info.id
    if target.private is not None and bool(info.private) != target.private:
        visibility = "private" if info.private else "public"
        target.notes.append(f"{info.id} is {visibility} and stays so (change it in the repo's settings)")
    try:
        client.head(target.repo_id, target.revision)
        target.branch = target.revision
    except RevisionNotFoundError:
        if target.pr:
            raise
        target.notes.append(f"branch {target.revision} is new and will start from main")


def _check_namespace(client: HubClient, repo_id: str) -> None:
    """A new repo needs a token, and a namespace that is ours."""
    namespace = repo_id.partition("/")[0]
    mine = client.namespaces()
    if namespace.lower() not in {name.lower() for name in mine}:
        raise AccessError(
            f"you are logged in as {mine[0]!r} and cannot create {repo_id}",
            hint=f"namespaces you can create repos in: {', '.join(mine)}",
        )


def _mark(rows: list[PlanRow], manifest: Manifest, diff: Diff) -> None:
    """Say for each SAE whether the Hub has it."""
    new, changed = {f.path for f in diff.new}, {f.path for f in diff.changed}
    for row, entry in zip(rows, manifest, strict=True):
        paths = {file.path for file in entry.files}
        row.on_hub = "new" if paths <= new else "changed" if paths & (new | changed) else "same"


def _row_notes(rows: list[PlanRow]) -> list[str]:
    """Notes on single SAEs; one that holds for many is said once."""
    said: dict[str, list[str]] = {}
    for row in rows:
        for note in row.check.notes:
            said.setdefault(note, []).append(row.id)
    lines = []
    for note, ids in said.items():
        every = len(ids) == len(rows)
        who = ids[0] if len(ids) == 1 else f"all {len(ids)} SAEs" if every else f"SAEs {listing(ids, 3)}"
        lines.append(f"{who}: {note}")
    return lines


def _file_notes(files: Sequence[LocalFile]) -> list[str]:
    found = [file.path for file in files if file.path.endswith(PICKLES)]
    if not found:
        return []
    return [f"{len(found)} pickle file{'s' if len(found) > 1 else ''} will be shipped too ({listing(found, 3)})"]


def _check_tag(client: HubClient, repo_id: str, tag: str, state: State, diff: Diff) -> None:
    """A tag that exists already must already mean exactly this; better to say so before the upload."""
    at = client.tags(repo_id).get(tag)
    if at is not None and not (diff.empty and at == state.head):
        raise tag_is_taken(repo_id, tag, at)


def _message(manifest: Manifest) -> str:
    count = len(manifest)
    return f"Publish {count} SAE{'s' if count != 1 else ''}" + (f" ({manifest.name})" if manifest.name else "")


def _repo_id(client: HubClient, repo_id: str | None, source: str | os.PathLike[str] | SAE) -> str:
    if repo_id is not None and "@" in repo_id:
        raise HubSAEError(f"{repo_id!r}: a push goes to a branch", hint="give it as revision= (--revision)")
    if repo_id is not None and "/" in repo_id:
        return repo_id
    if repo_id is None and isinstance(source, SAE):
        raise HubSAEError("which repo is this SAE published to?", hint='give its id: push(sae, "you/my-sae")')
    if repo_id is None and on_the_hub(source):  # pyright: ignore[reportArgumentType]
        return split_repo(str(source))[0]
    name = repo_id or Path(str(source)).expanduser().resolve().name.removesuffix(".safetensors").removesuffix(".pt")
    return f"{client.whoami()}/{name}"
