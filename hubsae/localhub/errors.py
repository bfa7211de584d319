"""Errors of the local hub: what a client is told, in the form the Hub's own clients look for.

Over plain http huggingface_hub tells errors apart by the `X-Error-Code` header alone (the rule "401 means
the repo does not exist" needs an https url), so every refusal that has a code must carry it.
"""

from __future__ import annotations


class HubError(Exception):
    """A refusal with an HTTP status, a sentence for a person and, where the client knows one, an error code.

    >>> error = HubError(404, "Repository not found", code="RepoNotFound")
    >>> error.status, error.code
    (404, 'RepoNotFound')
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}
        self.extra = extra or {}


class RepoMoved(Exception):
    """The repo has a new name; the app answers 307 to the same url under the new one."""

    def __init__(self, new_id: str) -> None:
        super().__init__(new_id)
        self.new_id = new_id


class LocalHubError(Exception):
    """The server itself cannot start or go on: folder in use, a missing package, a bad setting."""


def bad_request(message: str) -> HubError:
    """400 with a sentence."""
    return HubError(400, message)


def repo_not_found(authenticated: bool) -> HubError:
    """The same answer for "does not exist" and "you may not see it": 401 without a token, 404 with one."""
    if authenticated:
        return HubError(404, "Repository not found", code="RepoNotFound")
    return HubError(401, "Invalid username or password.", code="RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    """404 for a branch, tag, PR ref or commit that this repo does not have."""
    return HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_not_found(path: str, commit: str | None = None) -> HubError:
    """404 for a file. The commit goes along, so that the client can cache "no such file" for it."""
    headers = {"X-Repo-Commit": commit} if commit else {}
    return HubError(
        404, f"Entry not found: {path}" if path else "Entry not found", code="EntryNotFound", headers=headers
    )
