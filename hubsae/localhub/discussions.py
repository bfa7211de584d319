"""Discussions and pull requests of a repo: one JSON file each under `hub/discussions`, PR content in `refs/pr/N`."""

from __future__ import annotations

import secrets
import time
from itertools import islice
from typing import Any

from .errors import HubError, bad_request
from .files import read_json
from .history import log, merge_base, merge_trees, unified_diff
from .repos import Repo, iso


class Board:
    """The discussions of one repo. Changing methods take the repo's lock."""

    def __init__(self, repo: Repo) -> None:
        self.repo = repo
        self.folder = repo.path / "hub" / "discussions"

    def get(self, number: int) -> dict[str, Any]:
        """One discussion as stored; 404 where there is none."""
        found = read_json(self.folder / f"{number}.json")
        if found is None:
            raise HubError(404, f"Discussion {number} not found")
        return found

    def all(self) -> list[dict[str, Any]]:
        """All discussions, newest first."""
        numbers = sorted((int(p.stem) for p in self.folder.glob("*.json")), reverse=True)
        return [self.get(n) for n in numbers]

    def save(self, item: dict[str, Any]) -> None:
        self.repo.disk.write_json(self.folder / f"{item['num']}.json", item)

    def next_number(self) -> int:
        """A number no discussion and no PR ref has (a crash may have left a ref without its discussion)."""
        refs = [int(n) for n in self.repo.git.refs("pr") if n.isdigit()]
        files = [int(p.stem) for p in self.folder.glob("*.json")]
        return max([0, *refs, *files]) + 1

    def open(
        self,
        author: str,
        title: str,
        description: str,
        pull_request: bool,
        base: str = "main",
        commit: str | None = None,
    ) -> dict[str, Any]:
        """Start a discussion or a PR. With `commit` the PR begins there and is open; without, it is an empty draft."""
        title = title.strip()
        if not 3 <= len(title) <= 200:
            raise bad_request('"title" must be 3 to 200 characters long')
        with self.repo.lock:
            number = self.next_number()
            if pull_request:
                start = self.repo.git.ref(f"refs/heads/{base}")
                if start is None:
                    raise HubError(404, f"Invalid rev id: {base}", code="RevisionNotFound")
                self.repo.git.set_ref(f"refs/pr/{number}", commit or start)
            item = {
                "num": number,
                "title": title,
                "author": author,
                "created": time.time(),
                "pull_request": pull_request,
                "status": "draft" if pull_request and commit is None else "open",
                "base": base,
                "merge_commit": None,
                "events": [],
            }
            add_event(item, author, "comment", _comment(description, author))
            if commit:
                add_event(item, author, "commit", _commit_data(self.repo, commit))
            self.save(item)
            return item

    def note_commit(self, number: int, author: str, commit: str) -> None:
        """A commit was added to a PR ref."""
        with self.repo.lock:
            item = self.get(number)
            add_event(item, author, "commit", _commit_data(self.repo, commit))
            self.save(item)

    def comment(self, item: dict[str, Any], author: str, text: str) -> dict[str, Any]:
        if not text.strip():
            raise bad_request('"comment" must not be empty')
        event = add_event(item, author, "comment", _comment(text, author))
        self.save(item)
        return event

    def find_comment(self, item: dict[str, Any], event_id: str) -> dict[str, Any]:
        for event in item["events"]:
            if event["id"] == event_id and event["type"] == "comment":
                return event
        raise HubError(404, f"Comment {event_id} not found")

    def retitle(self, item: dict[str, Any], author: str, title: str) -> dict[str, Any]:
        title = title.strip()
        if not 3 <= len(title) <= 200:
            raise bad_request('"title" must be 3 to 200 characters long')
        event = add_event(item, author, "title-change", {"from": item["title"], "to": title})
        item["title"] = title
        self.save(item)
        return event

    def set_status(self, item: dict[str, Any], author: str, status: str, comment: str) -> dict[str, Any]:
        if status not in ("open", "closed"):
            raise bad_request('"status" must be "open" or "closed"')
        if item["status"] == "merged":
            raise bad_request("This pull request is merged; its status cannot change")
        if item["status"] == status:
            raise bad_request(f"This discussion is {status} already")
        if comment:
            add_event(item, author, "comment", _comment(comment, author))
        event = add_event(item, author, "status-change", {"status": status})
        item["status"] = status
        self.save(item)
        return event

    # -- pull requests ------------------------------------------------------------------------------------

    def conflicts(self, item: dict[str, Any]) -> list[str]:
        """Files a merge could not bring together."""
        theirs, ours = self.repo.git.ref(f"refs/pr/{item['num']}"), self.repo.git.ref(f"refs/heads/{item['base']}")
        if item["status"] not in ("open", "draft") or theirs is None or ours is None:
            return []
        return self._merge(ours, theirs)[1]

    def _merge(self, ours: str, theirs: str) -> tuple[str, list[str]]:
        git = self.repo.git
        base = merge_base(git, ours, theirs)
        return merge_trees(git, git.commit(base).tree if base else None, git.commit(ours).tree, git.commit(theirs).tree)

    def merge(self, item: dict[str, Any], author: str, comment: str) -> dict[str, Any]:
        """Bring a PR into its base as one commit, as the Hub does, and close it."""
        git = self.repo.git
        if not item["pull_request"]:
            raise bad_request("This is a discussion, not a pull request")
        if item["status"] != "open":
            raise bad_request(f"This pull request is {item['status']}; only an open one can be merged")
        theirs, ours = git.ref(f"refs/pr/{item['num']}"), git.ref(f"refs/heads/{item['base']}")
        if theirs is None or ours is None:
            raise HubError(404, "The branch of this pull request is gone", code="RevisionNotFound")
        tree, conflicts = self._merge(ours, theirs)
        if conflicts:
            raise HubError(409, f"This pull request has conflicts in {', '.join(conflicts[:10])}")
        title = f"{item['title']} (#{item['num']})"
        if tree == git.commit(ours).tree and (done := self._merged_before(ours, title)) is not None:
            return self._close_merged(item, author, done)  # the server died between the commit and this record
        steps = _since(self.repo, theirs, merge_base(git, ours, theirs))
        authors = sorted({c.author for c in steps} - {author})
        lines = [title, "", *(f"- {c.title} ({c.sha})" for c in steps)]
        lines += ["", *(f"Co-authored-by: {a} <{a}@users.noreply.local-hub>" for a in authors)] if authors else []
        sha = git.write_commit(tree, [ours], author, "\n".join(lines).rstrip())
        git.set_ref(f"refs/heads/{item['base']}", sha)
        if comment:
            add_event(item, author, "comment", _comment(comment, author))
        return self._close_merged(item, author, sha)

    def _merged_before(self, head: str, title: str) -> str | None:
        """The commit of an earlier merge with this title, among the newest of the branch."""
        return next((c.sha for c in islice(log(self.repo.git, head), 100) if c.title == title), None)

    def _close_merged(self, item: dict[str, Any], author: str, sha: str) -> dict[str, Any]:
        event = add_event(item, author, "status-change", {"status": "merged"})
        item["status"] = "merged"
        item["merge_commit"] = sha
        self.save(item)
        return event

    # -- the clients' view --------------------------------------------------------------------------------

    def summary(self, item: dict[str, Any]) -> dict[str, Any]:
        """A line of the list."""
        return {
            "num": item["num"],
            "title": item["title"],
            "author": _author(item["author"]),
            "createdAt": iso(item["created"]),
            "status": item["status"],
            "isPullRequest": item["pull_request"],
            "repo": {"name": self.repo.id, "type": self.repo.kind[:-1]},
            "numComments": sum(e["type"] == "comment" for e in item["events"]),
            "pinned": False,
        }

    def details(self, item: dict[str, Any], diff: bool) -> dict[str, Any]:
        """A discussion in full."""
        view = {**self.summary(item), "events": [event_view(e) for e in item["events"]]}
        if item["pull_request"]:
            view["changes"] = {"base": f"refs/heads/{item['base']}"}
            if item["merge_commit"]:
                view["changes"]["mergeCommitId"] = item["merge_commit"]
            view["filesWithConflicts"] = self.conflicts(item)
            if diff:
                view["diff"] = self._diff(item)
        return view

    def _diff(self, item: dict[str, Any]) -> str:
        git = self.repo.git
        theirs, ours = git.ref(f"refs/pr/{item['num']}"), git.ref(f"refs/heads/{item['base']}")
        if theirs is None or ours is None:
            return ""
        base = merge_base(git, ours, theirs)
        return unified_diff(git, git.commit(base).tree if base else None, git.commit(theirs).tree)


def _since(repo: Repo, sha: str, base: str | None) -> list[Any]:
    """The PR's own commits, oldest first (along first parents)."""
    found = []
    while sha != base:
        commit = repo.git.commit(sha)
        found.append(commit)
        if not commit.parents:
            break
        sha = commit.parents[0]
    return found[::-1]


def add_event(item: dict[str, Any], author: str, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """Append to a discussion's history."""
    event = {"id": secrets.token_hex(12), "type": kind, "author": author, "created": time.time(), "data": data}
    item["events"].append(event)
    return event


def event_view(event: dict[str, Any]) -> dict[str, Any]:
    """An event as the clients read it."""
    return {
        "id": event["id"],
        "type": event["type"],
        "createdAt": iso(event["created"]),
        "author": _author(event["author"]),
        "data": event["data"],
    }


def _author(name: str) -> dict[str, Any]:
    return {"name": name, "fullname": name, "type": "user", "isPro": False, "avatarUrl": ""}


def _comment(text: str, author: str) -> dict[str, Any]:
    return {
        "edited": False,
        "hidden": False,
        "numEdits": 0,
        "latest": {"raw": text, "html": "", "updatedAt": iso(time.time()), "author": _author(author)},
    }


def _commit_data(repo: Repo, sha: str) -> dict[str, Any]:
    return {"oid": sha, "subject": repo.git.commit(sha).title}
