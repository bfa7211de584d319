"""Looking into a repo: file tree, information about single paths, commits, refs."""

from __future__ import annotations

from itertools import islice
from typing import Any

from ..describe import add_expanded, describe_commit, describe_entry
from ..errors import bad_request, entry_not_found
from ..gitstore import Entry
from ..history import log
from ..http import Call, answer, paged
from ..repos import Repo
from ..routing import Router

routes = Router()


@routes.on("GET", "/api/{kind}/{repo}/tree/{revision}/{path...}")
def tree(call: Call) -> Any:
    """Entries of a folder; with `recursive` everything below, folders included; pages by `Link`."""
    repo, sha, path, folder = find_folder(call)
    entries = sorted(
        repo.git.walk(folder.sha, path, recursive=call.flag("recursive")), key=lambda e: (not e[1].is_tree, e[0])
    )
    expand = call.flag("expand")
    size = call.hub.settings.page_size
    size = max(1, size // 20) if expand else size
    limit = call.query.get("limit", "")
    if limit.isdigit() and 0 < int(limit[:9]) < size:
        size = int(limit)
    # only the page is described: sizes of 100,000 files are not read to show 1,000
    page = paged(call, entries, size, {"X-Repo-Commit": sha}, lambda es: _lines(repo, sha, es, expand))
    return page


def find_folder(call: Call) -> tuple[Repo, str, str, Entry]:
    """The folder that the url names: repo, commit, path, its entry in the tree."""
    repo = call.repo()
    sha = repo.git.resolve(call["revision"])
    path = call["path"].strip("/")
    folder = repo.git.lookup(repo.git.commit(sha).tree, path)
    if folder is None or not folder.is_tree:
        raise entry_not_found(path, sha)
    return repo, sha, path, folder


def _lines(repo: Any, sha: str, entries: list[Any], expand: bool) -> list[dict[str, Any]]:
    lines = [describe_entry(repo, path, entry) for path, entry in entries]
    return add_expanded(repo, sha, lines) if expand else lines


@routes.on("POST", "/api/{kind}/{repo}/paths-info/{revision}")
def paths_info(call: Call) -> Any:
    """The tree lines of given paths; unknown paths are left out."""
    repo = call.repo()
    sha = repo.git.resolve(call["revision"])
    root = repo.git.commit(sha).tree
    form = call.form()
    paths = [p.strip("/") for p in form.get("paths", [])]
    if len(paths) > 20_000:
        raise bad_request("Too many paths")
    found = [(p, e) for p in dict.fromkeys(paths) if p and (e := repo.git.lookup(root, p)) is not None]
    expand = form.get("expand", ["false"])[0].lower() in ("1", "true")
    return answer(_lines(repo, sha, found, expand), headers={"X-Repo-Commit": sha})


@routes.on("GET", "/api/{kind}/{repo}/commits/{revision}")
def commits(call: Call) -> Any:
    """History, newest first."""
    repo = call.repo()
    sha = repo.git.resolve(call["revision"])
    formatted = "formatted" in call.query.getlist("expand[]") + call.query.getlist("expand")
    limit = call.query.get("limit", "")
    size = min(int(limit), 1000) if limit.isdigit() and len(limit) < 9 and int(limit) > 0 else 50
    found = list(islice(log(repo.git, sha), 100_000))
    headers = {"X-Total-Count": str(len(found))}
    return paged(call, found, size, headers, lambda cs: [describe_commit(c, formatted) for c in cs])


@routes.on("GET", "/api/{kind}/{repo}/refs")
def refs(call: Call) -> Any:
    """Branches, tags and, where asked for, PR refs."""
    repo = call.repo()

    def lines(kind: str) -> list[dict[str, str]]:
        return [
            {
                "name": name if kind != "pr" else f"refs/pr/{name}",
                "ref": f"refs/{kind}/{name}",
                "targetCommit": repo.git.peel(sha),
            }
            for name, sha in repo.git.refs(kind).items()
        ]

    found: dict[str, Any] = {"branches": lines("heads"), "tags": lines("tags"), "converts": []}
    if call.flag("include_prs"):
        found["pullRequests"] = lines("pr")
    return found
