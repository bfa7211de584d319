"""What can go wrong between here and a Hub, by type. `explain` makes these out of the client library's exceptions."""

from __future__ import annotations

from hubsae.core.errors import HubRequestError, HubSAEError, NotFoundError


class RepoNotFoundError(NotFoundError):
    """No such repo, or one that this token cannot see."""


class RevisionNotFoundError(NotFoundError):
    """The repo has no such branch, tag, commit or pull request."""


class AccessError(HubRequestError):
    """The Hub refuses: a token is missing, invalid, or not allowed to do this."""


class OfflineError(HubRequestError):
    """Offline, and the cache lacks what was asked for."""


class ConflictError(HubRequestError):
    """Another writer kept changing the branch."""


class IntegrityError(HubRequestError):
    """What arrived is not what the manifest says."""


class DiskFullError(HubSAEError, OSError):
    """No room to cache a download or to write a release."""


class CacheError(HubSAEError, OSError):
    """The cache cannot be written, or holds what it should not."""
