"""Publish a set of files in one commit, or not at all, whatever fails and whenever the process dies.

The machine, for a branch:

    look      head of the branch and its tree
    build     the caller makes the files for that state (manifest and README depend on what is there)
    compare   with the tree: nothing to do -> done, no commit
    send      large objects, group by group; invisible until committed, and found again by the next run
    commit    once, with the head as its parent
              refused, the branch moved  -> look again, build again
              no clear answer            -> look: are our files there? then it was made. else commit again
    check     the tree of the new commit against every file

A commit names its parent, so it can only ever be made once: a repetition of one that went through unnoticed is
refused (the branch moved), and looking again finds nothing left to do. A pull request is a branch (`refs/pr/N`) that
is found again by a fingerprint in its description.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hubsae.core.errors import HubRequestError, HubSAEError
from hubsae.core.progress import progress
from hubsae.hub.client import HubClient
from hubsae.hub.contents import Contents, Diff, LocalFile, State, compare, fingerprint
from hubsae.hub.errors import ConflictError, IntegrityError
from hubsae.hub.explain import explained
from hubsae.hub.retry import ALL_TRIES, describe, is_transient, retrying, status_of, tries_made

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

T = TypeVar("T")

GROUP_BYTES = 64 << 20
GROUP_FILES = 100
MAX_REPLANS = 12


@dataclass(frozen=True)
class Published:
    """The outcome of a push."""

    repo_id: str
    commit: str
    revision: str
    committed: bool
    """False where the Hub already held all of it."""
    diff: Diff
    url: str
    pr_url: str | None = None


Builder = Callable[[State], Contents]


def look(client: HubClient, repo_id: str, revision: str, *, repo_type: str = "model") -> State:
    """The head of a branch and the files of exactly that commit."""
    head = client.head(repo_id, revision, repo_type=repo_type)
    return State(head, client.tree(repo_id, head, repo_type=repo_type))


def publish(
    client: HubClient,
    repo_id: str,
    build: Builder,
    *,
    message: str,
    revision: str = "main",
    repo_type: str = "model",
    pr: bool = False,
    bar: bool | None = None,
) -> Published:
    """Bring a branch (or a pull request against it) to what `build` asks for; a branch is made if it is missing."""
    from huggingface_hub import CommitOperationAdd

    if revision != "main" and not pr and not revision.startswith("refs/"):
        client.ensure_branch(repo_id, revision, repo_type=repo_type)
    branch = _Branch(client, repo_id, repo_type, revision, message)
    pr_url = None
    if pr:
        state = branch.look()
        contents = build(state)
        diff = compare(contents, state.tree)
        if diff.empty:
            return Published(repo_id, state.head, revision, False, diff, client.page(repo_id, repo_type))
        pr_url = branch.become_pull_request(contents)
    refused = 0
    while True:
        state = branch.look()
        contents = build(state)
        diff = compare(contents, state.tree)
        if diff.empty:
            commit, committed = state.head, refused > 0
            break
        additions = [
            CommitOperationAdd(f.path, f.source if isinstance(f.source, bytes) else str(f.source)) for f in diff.sent
        ]
        branch.send(additions, diff, bar)
        made = branch.commit(additions, diff, state.head)
        if made is not None:
            branch.check(made, contents)
            commit, committed = made, True
            break
        refused += 1
        if refused > MAX_REPLANS:
            raise ConflictError(
                f"{repo_id}: other writers changed {branch.ref} {refused} times while this push was at work",
                hint="run the same command again when they are done; nothing of it has to be sent twice",
            )
        client.say(f"{branch.ref} moved while we were uploading; planning again on top of it")
    if pr:
        branch.open_for_review()
    url = pr_url or client.page(repo_id, repo_type, None if revision == "main" else revision)
    return Published(repo_id, commit, branch.ref, committed, diff, url, pr_url)


@dataclass
class _Branch:
    """A branch or pull request that is written to, and the few requests that the machine makes of it."""

    client: HubClient
    repo_id: str
    repo_type: str
    ref: str
    message: str

    def look(self) -> State:
        """As it is now."""
        return look(self.client, self.repo_id, self.ref, repo_type=self.repo_type)

    def explained(self) -> AbstractContextManager[None]:
        """Readable errors for a request that writes."""
        return explained(self.client, self.repo_id, revision=self.ref, repo_type=self.repo_type, writing=True)

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """One request that writes."""
        about: dict[str, Any] = {"revision": self.ref, "repo_type": self.repo_type, "writing": True}
        return self.client.ask(what, call, self.repo_id, **about)

    # -- large objects -----------------------------------------------------------------------------------------

    def send(self, additions: list[CommitOperationAdd], diff: Diff, bar: bool | None) -> None:
        """Upload what goes into large-object storage; the branch does not change yet."""
        client = self.client
        with (
            client.quiet(),
            progress(f"uploading to {self.repo_id}", diff.bytes_to_send, "bytes", show=bar) as task,
            self.explained(),
        ):
            for group, size in _groups(diff.sent, additions):

                def send(group: list[Any] = group) -> None:
                    client.api.preupload_lfs_files(
                        self.repo_id, group, repo_type=self.repo_type, revision=self.ref, free_memory=False
                    )

                _with_lfs_as_fallback(client, send)
                task.advance(size)

    # -- the one commit ----------------------------------------------------------------------------------------

    def commit(self, additions: list[CommitOperationAdd], diff: Diff, parent: str) -> str | None:
        """Make the commit on top of `parent`; its sha, or None if the branch has moved and a new plan is needed."""
        from huggingface_hub import CommitOperationDelete

        client = self.client
        operations = [*additions, *(CommitOperationDelete(path) for path in diff.deleted)]
        now = State(parent, {})

        def ask() -> str:
            with warnings.catch_warnings():  # tables of an index belong to their release
                warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
                info = client.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=self.message,
                    repo_type=self.repo_type,
                    revision=self.ref,
                    parent_commit=parent,
                )
            return str(info.oid)

        def worth_another(error: BaseException) -> bool:
            nonlocal now
            moved = status_of(error) in (409, 412)
            if moved or is_transient(error):
                now = self.look()  # whatever the answer was, the branch says what happened
            return not moved and now.head == parent and is_transient(error)

        with self.explained():
            try:
                return retrying(
                    ask, policy=client.policy, what="the commit", notify=client.say, transient=worth_another
                )
            except Exception as error:
                if now.head == parent:
                    raise
                if status_of(error) in (409, 412) or not _holds(now, diff):
                    return None
                client.say(f"the answer to the commit was lost ({describe(error)}), but it was made")
        return self._ours(now.head, parent)

    def _ours(self, head: str, parent: str) -> str:
        """The commit that was made right on top of `parent` (others may have followed)."""

        def ask() -> str:
            commits = self.client.api.list_repo_commits(self.repo_id, revision=head, repo_type=self.repo_type)
            newest_first = [commit.commit_id for commit in commits]
            return newest_first[newest_first.index(parent) - 1]

        try:
            return self.client.retry(ask, "listing commits")
        except (ValueError, HubRequestError):
            return head

    def check(self, commit: str, contents: Contents) -> None:
        """Every file of the new commit is the one that was meant."""
        tree = self.client.tree(self.repo_id, commit, repo_type=self.repo_type)
        wrong = [file.path for file in contents.files if not file.same_as(tree.get(file.path))]
        wrong += [path for path in contents.delete if path in tree]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise IntegrityError(
                f"{self.repo_id}@{commit[:10]} does not hold what was sent: {shown}",
                hint="were the local files changed during the push? run the same command again to correct them",
            )

    # -- pull requests -----------------------------------------------------------------------------------------

    def become_pull_request(self, contents: Contents) -> str:
        """Our pull request for exactly this content, the open one or a new one; its page."""
        if self.ref != "main":
            raise HubSAEError(
                f"a pull request goes against main, not {self.ref!r}", hint="use either --pr or --revision"
            )
        api, mark = self.client.api, f"hubsae-push {fingerprint(contents.files)}"

        def find_or_create() -> tuple[int, str]:
            # a lost answer to the creation is found by the next try
            me = api.whoami()["name"]
            for found in api.get_repo_discussions(
                self.repo_id, repo_type=self.repo_type, author=me, discussion_type="pull_request"
            ):
                if found.status not in ("open", "draft"):
                    continue
                details = api.get_discussion_details(self.repo_id, found.num, repo_type=self.repo_type)
                if any(mark in (getattr(event, "content", "") or "") for event in details.events):
                    return found.num, found.url
            made = api.create_pull_request(
                self.repo_id,
                title=self.message,
                description="Published with hubsae.\n\nTry it before merging: pass this pull request as "
                f'`revision="refs/pr/NUMBER"`.\n\n<!-- {mark} -->',
                repo_type=self.repo_type,
            )
            return made.num, made.url

        number, url = self.ask("opening the pull request", find_or_create)
        self.ref = f"refs/pr/{number}"
        return url

    def open_for_review(self) -> None:
        """A pull request is born as a draft; now that it holds the whole release, open it for review."""
        api, number = self.client.api, int(self.ref.rpartition("/")[2])

        def ask() -> None:
            if api.get_discussion_details(self.repo_id, number, repo_type=self.repo_type).status == "draft":
                api.change_discussion_status(self.repo_id, number, "open", repo_type=self.repo_type)

        self.ask("opening the pull request for review", ask)


def _holds(state: State, diff: Diff) -> bool:
    return all(f.same_as(state.tree.get(f.path)) for f in diff.sent) and not any(
        path in state.tree for path in diff.deleted
    )


# -- large objects by groups, by Xet or LFS ----------------------------------------------------------------------


def _groups(files: Sequence[LocalFile], additions: Sequence[Any]) -> Iterator[tuple[list[Any], int]]:
    group: list[Any] = []
    size = 0
    for file, addition in zip(files, additions, strict=True):
        if group and (size + file.size > GROUP_BYTES or len(group) >= GROUP_FILES):
            yield group, size
            group, size = [], 0
        group.append(addition)
        size += file.size
    if group:
        yield group, size


def _with_lfs_as_fallback(client: HubClient, send: Callable[[], None]) -> None:
    """Send by Xet where the Hub has it and it answers, else by LFS; this push remembers, the process does not."""
    from huggingface_hub.utils._runtime import is_xet_available

    if client.xet and is_xet_available():
        try:
            retrying(send, policy=client.policy, what="an upload", notify=client.say, transient=_worth_xet)
            return
        except Exception as error:
            if not _of_xet(error):
                raise
            missing = status_of(error) in (404, None) and "Not Found" in str(error)
            why = "has no Xet storage" if missing else f"does not answer for Xet storage ({describe(error)})"
            client.say(f"{client.address} {why}; uploading by LFS instead (HF_HUB_DISABLE_XET=1 skips the attempt)")
            client.xet = False
    with _without_xet():
        retrying(send, policy=client.policy, what="an upload", notify=client.say)


def _worth_xet(error: BaseException) -> bool:
    return is_transient(error) and not _of_xet(error)


def _of_xet(error: BaseException | None) -> bool:
    """Whether it was the Xet storage, or the token for it, that failed."""
    while error is not None:
        if "xet-write-token" in str(error) or tries_made(error) == ALL_TRIES:
            return status_of(error) not in (401, 403)
        error = error.__cause__
    return False


@contextmanager
def _without_xet() -> Iterator[None]:
    """Uploads go by LFS meanwhile; there is no argument that asks for it."""
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
