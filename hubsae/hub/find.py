"""SAEs for a model: releases that SAELens registers, and repos on the Hub that are tagged as SAEs of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hubsae.core.errors import HubSAEError, nearest
from hubsae.formats.saelens_config import hub_id
from hubsae.hub import registered
from hubsae.hub.client import HubClient

TAGS = ("sparse-autoencoder", "saelens")
"""Tags by which SAEs are told from other repos; a repo has either."""


@dataclass
class Found:
    """What there is for a model, and what could not be asked."""

    base_model: str
    """Its id on the Hub."""
    registered: list[dict[str, Any]] = field(default_factory=list)
    """Releases: `name` (to load by), `repo`, `saes` (how many)."""
    tagged: list[dict[str, Any]] = field(default_factory=list)
    """Repos: `repo`, `library`, `downloads`."""
    notes: list[str] = field(default_factory=list)


def find_saes(
    base_model: str, *, token: str | bool | None = None, endpoint: str | None = None, limit: int = 100
) -> Found:
    """Releases and repos with SAEs of a model.

    Args:
        base_model: Its id on the Hub, or TransformerLens' short name.
        token: Access token; False sends none, None the one that is logged in.
        endpoint: Address of the Hub, in place of HF_ENDPOINT.
        limit: At most so many repos of the Hub for each tag.
    """
    wanted = str(hub_id(base_model))
    found = Found(wanted)
    _ask_register(found, base_model)
    _ask_hub(found, HubClient(token, endpoint or ""), limit)
    return found


def _ask_register(found: Found, asked: str) -> None:
    if registered.register_file() is None:
        found.notes.append(f"releases that SAELens registers are listed where it is installed: {registered.HINT}")
        return
    every = registered.releases()
    for release in every:
        known = str(hub_id(release.model)).lower()
        if (
            asked.lower() in (release.model.lower(), known, known.rpartition("/")[2])
            or known == found.base_model.lower()
        ):
            found.registered.append({"name": release.name, "repo": release.repo_id, "saes": len(release.saes)})
    if not found.registered:
        models = {str(hub_id(release.model)) for release in every}
        found.notes.append(
            f"no release is registered for {found.base_model}; nearest: {nearest(asked, sorted(models))}"
        )


def _ask_hub(found: Found, client: HubClient, limit: int) -> None:
    if client.offline:
        found.notes.append("the Hub was not asked (offline)")
        return
    repos: dict[str, dict[str, Any]] = {}
    try:
        for tag in TAGS:
            wanted = [tag, f"base_model:{found.base_model}"]
            models = client.ask(
                "listing models", lambda wanted=wanted: list(client.api.list_models(filter=wanted, limit=limit))
            )
            for model in models:
                repos[model.id] = {"repo": model.id, "library": model.library_name, "downloads": model.downloads}
    except HubSAEError as error:  # what the register says is worth printing all the same
        found.notes.append(f"the Hub could not be asked: {error.message}")
    found.tagged = sorted(repos.values(), key=lambda row: -(row["downloads"] or 0))
