"""Web pages for a person: what is on this hub, and per repo its card, files and commits."""

from __future__ import annotations

from ..routing import Router

routes = Router()
