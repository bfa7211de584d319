"""Writing: how files should be sent (preupload), commits, and the list of LFS files with permanent deletion."""

from __future__ import annotations

from typing import Any

import pathspec
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ..commitops import CommitPlan, base_branch, branch_ref, build_tree, check_parent, commit_on, read_plan
from ..describe import describe_commit
from ..discussions import Board
from ..errors import HubError, bad_request
from ..gitstore import GitStore
from ..history import TreeEditor, log
from ..http import Call, answer, check_path
from ..lfs import AttributeRules
from ..repos import Repo, iso
from ..routing import Router

routes = Router()


def may_contribute(call: Call, repo: Repo) -> str:
    """Anyone with a write token may propose changes to what they can see."""
    name = call.need_user()
    if call.caller.role != "write":
        raise HubError(403, "This token can only read. Use a token with write access")
    if not call.hub.registry.may_write(repo, call.caller):
        call.hub.registry.require_content(repo, call.caller)
    return name


@routes.on("POST", "/api/{kind}/{repo}/preupload/{revision}")
def preupload(call: Call) -> Any:
    """For each file: regular or LFS, ignored or not, and the id of what is there already."""
    repo = call.repo()
    create_pr = call.flag("create_pr")
    may_contribute(call, repo)
    ref = call["revision"]
    if not create_pr and not ref.startswith("refs/pr/"):
        call.hub.registry.require_write(repo, call.caller)
    head = repo.git.resolve(f"refs/heads/{base_branch(repo, ref)}" if create_pr else ref)
    body = call.json()
    files = body.get("files")
    if not isinstance(files, list):
        raise bad_request('"files" must be a list')
    root = repo.git.commit(head).tree
    attributes = body.get("gitAttributes")
    rules = AttributeRules(attributes if isinstance(attributes, str) else repo.text(head, ".gitattributes") or "")
    ignore = body.get("gitIgnore")
    if not isinstance(ignore, str):
        ignore = repo.text(head, ".gitignore") or ""
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", _safe_lines(ignore))
    answers = []
    for item in files:
        if not isinstance(item, dict):
            raise bad_request('"files" must be a list of objects')
        path = check_path(item.get("path"))
        size = item.get("size", 0)
        if not isinstance(size, int):
            raise bad_request('"size" must be a number of bytes')
        entry = repo.git.lookup(root, path)
        line: dict[str, Any] = {"path": path, "shouldIgnore": ignored.match_file(path)}
        lfs = rules.is_lfs(path) or size > call.hub.settings.lfs_threshold
        line["uploadMode"] = "lfs" if lfs else "regular"
        if entry is not None and not entry.is_tree:
            info = repo.blob_info(entry)
            line["oid"] = info.lfs.oid if info.lfs else entry.sha
        answers.append(line)
    return {"files": answers, "commitOid": head}


def _safe_lines(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        try:
            pathspec.PathSpec.from_lines("gitwildmatch", [line])
        except ValueError:
            continue
        lines.append(line)
    return lines


@routes.on("POST", "/api/{kind}/{repo}/commit/{revision}", body="stream")
async def commit(call: Call) -> Response:
    """One commit, sent as lines of JSON. The body goes to disk first: it may be hundreds of megabytes."""
    repo = await run_in_threadpool(call.repo)
    create_pr = call.flag("create_pr")
    author = await run_in_threadpool(may_contribute, call, repo)
    revision = call["revision"]
    if not create_pr and not revision.startswith("refs/pr/"):
        call.hub.registry.require_write(repo, call.caller)
    await run_in_threadpool(base_branch if create_pr else branch_ref, repo, revision)
    with call.hub.disk.temp_file("commit") as (path, handle):
        await call.drain(call.hub.settings.max_commit, handle.write)
        handle.flush()
        return await run_in_threadpool(_finish, call, repo, revision, create_pr, author, path)


def _finish(call: Call, repo: Repo, revision: str, create_pr: bool, author: str, body: Any) -> Response:
    ref = None if create_pr else branch_ref(repo, revision)
    plan = read_plan(repo, body)
    url = f"{call.base}/{repo.url_path}"
    if create_pr:
        sha, number = _open_pr(repo, revision, plan, author)
        found = {"pullRequestUrl": f"{url}/discussions/{number}"}
    else:
        assert ref is not None
        sha = commit_on(repo, ref, plan, author)
        found = {}
        number = ref.rsplit("/", 1)[-1]
        if ref.startswith("refs/pr/") and number.isdigit():
            Board(repo).note_commit(int(number), author, sha)
    return answer({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": "", **found})


def _open_pr(repo: Repo, revision: str, plan: CommitPlan, author: str) -> tuple[str, int]:
    """A new PR against a branch, holding this commit."""
    with repo.lock:
        revision = base_branch(repo, revision)
        head = repo.git.ref(f"refs/heads/{revision}")
        assert head is not None
        check_parent(repo.git, plan, head)
        tree = build_tree(repo, repo.git.commit(head).tree, plan)
        sha = repo.git.write_commit(tree, [head], author, plan.message)
        title = (plan.summary.strip()[:200]).ljust(3)
        title = title if len(title.strip()) >= 3 else f"{title.strip()} (changes)"
        item = Board(repo).open(author, title, plan.description, True, revision, sha)
        return sha, item["num"]


@routes.on("GET", "/api/{kind}/{repo}/compare/{change}")
def compare(call: Call) -> Response:
    """The diff `a..b` of two revisions, as text."""
    from starlette.responses import PlainTextResponse

    from ..history import unified_diff

    repo = call.repo()
    call.hub.registry.require_content(repo, call.caller)
    left, _, right = call["change"].partition("..")
    right = right.lstrip(".")
    if not left or not right:
        raise bad_request("Compare two revisions as a..b")
    git = repo.git
    return PlainTextResponse(unified_diff(git, git.commit(git.resolve(left)).tree, git.commit(git.resolve(right)).tree))


# -- LFS files of a repo, over all its history ------------------------------------------------------------


def _history_of_lfs(repo: Repo) -> dict[str, dict[str, Any]]:
    """Every LFS file any ref reaches: where it was first seen, under which name."""
    found: dict[str, dict[str, Any]] = {}
    heads = [(f"refs/heads/{n}", s) for n, s in repo.git.refs("heads").items()]
    heads += [(f"refs/pr/{n}", s) for n, s in repo.git.refs("pr").items()]
    seen: set[str] = set()
    for ref, head in heads:
        for item in log(repo.git, head):
            if item.sha in seen:
                continue
            seen.add(item.sha)
            for path, entry in repo.git.walk(item.tree):
                if entry.is_tree or (pointer := repo.blob_info(entry).lfs) is None:
                    continue
                old = found.get(pointer.oid)
                if old is None or (old["ref"] == ref and item.when <= old["when"]):
                    found[pointer.oid] = {
                        "when": item.when,
                        "path": path,
                        "ref": ref,
                        "size": pointer.size,
                        "who": item.author,
                    }
    return found


@routes.on("GET", "/api/{kind}/{repo}/lfs-files")
def lfs_files(call: Call) -> Any:
    repo = call.repo()
    call.hub.registry.require_write(repo, call.caller)
    lines = []
    for oid, item in sorted(_history_of_lfs(repo).items(), key=lambda pair: -pair[1]["when"]):
        line = {
            "fileOid": oid,
            "filename": item["path"],
            "oid": oid,
            "pushedAt": iso(item["when"]),
            "pusher": {"name": item["who"], "type": "user"},
            "ref": item["ref"],
            "size": item["size"],
        }
        if (name := repo.lfs.xet_hash(oid)) is not None:
            line["xetHash"] = name
        lines.append(line)
    return answer(lines)


@routes.on("POST", "/api/{kind}/{repo}/lfs-files/batch")
def delete_lfs_files(call: Call) -> Any:
    """Delete LFS content for good; with `rewriteHistory` every commit that named it is rewritten without it."""
    repo = call.repo()
    call.hub.registry.require_write(repo, call.caller)
    wanted = call.json().get("deletions")
    shas = wanted.get("sha") if isinstance(wanted, dict) else None
    if not isinstance(wanted, dict) or not isinstance(shas, list) or not all(isinstance(s, str) for s in shas):
        raise bad_request('"deletions" must hold "sha", a list of ids')
    gone = {s for s in shas if s in repo.lfs.all_oids() or len(s) == 64}
    with repo.lock:
        if wanted.get("rewriteHistory", True):
            for kind in ("heads", "pr", "tags"):
                for name, sha in repo.git.refs(kind).items():
                    new = _rewrite(repo, repo.git.peel(sha), gone, {})
                    if new != sha:
                        repo.git.set_ref(f"refs/{kind}/{name}", new)
        for oid in gone:
            if all(c in "0123456789abcdef" for c in oid):
                repo.lfs.forget(oid)
    return {"deleted": sorted(gone)}


def _rewrite(repo: Repo, head: str, gone: set[str], done: dict[str, str]) -> str:
    """The same history without these files. Oldest first, so deep histories need no recursion."""
    for item in reversed(_topological(repo.git, head)):
        editor = TreeEditor(repo.git, item.tree)
        changed = False
        for path, entry in repo.git.files(item.tree).items():
            pointer = repo.blob_info(entry).lfs
            if pointer is not None and pointer.oid in gone:
                editor.delete(path)
                changed = True
        parents = [done[p] for p in item.parents]
        if changed or parents != list(item.parents):
            done[item.sha] = repo.git.write_commit(editor.write(), parents, item.author, item.message, item.when)
        else:
            done[item.sha] = item.sha
    return done[head]


def _topological(git: GitStore, head: str) -> list[Any]:
    """Children before parents."""
    order: list[Any] = []
    seen: set[str] = set()
    stack: list[tuple[str, bool]] = [(head, False)]
    while stack:
        sha, ready = stack.pop()
        if ready:
            order.append(git.commit(sha))
        elif sha not in seen:
            seen.add(sha)
            stack.append((sha, True))
            stack += [(p, False) for p in git.commit(sha).parents]
    return order[::-1]


@routes.on("POST", "/api/{kind}/{repo}/lfs-files/duplicate")
def duplicate_lfs_files(call: Call) -> Any:
    """Let another repo have LFS files of this one, without moving bytes."""
    source = call.repo()
    call.hub.registry.require_content(source, call.caller)
    body = call.json()
    target, files = body.get("target"), body.get("files")
    if not isinstance(target, dict) or not isinstance(files, list):
        raise bad_request('"target" must be an object and "files" a list')
    kind, name = target.get("type", "model"), target.get("name")
    if not isinstance(kind, str) or not isinstance(name, str):
        raise bad_request('"target" must hold "type" and "name"')
    repo = call.hub.registry.find(f"{kind}s", name, call.caller)
    may_contribute(call, repo)
    failed, succeeded = [], []
    for item in files:
        oid = item.get("sha256") if isinstance(item, dict) else None
        if isinstance(oid, str) and len(oid) == 64 and oid.isalnum() and repo.lfs.copy_from(source.lfs, oid):
            succeeded.append({"sha256": oid})
        else:
            failed.append({"sha256": str(oid), "error": "This repository has no such file"})
    return {"failed": failed, "succeeded": succeeded}


@routes.on("GET", "/api/{kind}/{repo}/commit/{revision}")
def one_commit(call: Call) -> Any:
    repo = call.repo()
    return describe_commit(repo.git.commit(repo.git.resolve(call["revision"])))
