"""A real Hugging Face Hub server for one machine or one lab: stock clients push to it and load from it.

>>> from hubsae.localhub import running
>>> with running() as hub:
...     hub.token.startswith("hf_")
True

Imports nothing else of hubsae, and nothing heavy until a hub is started.
"""

from .errors import LocalHubError
from .faults import Fault
from .server import LocalHub, running
from .settings import Org, Settings, Token

__all__ = ["Fault", "LocalHub", "LocalHubError", "Org", "Settings", "Token", "running"]
