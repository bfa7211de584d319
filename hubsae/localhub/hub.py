"""The state of one running hub: its folder, its repos, its people, its faults. Routes get it with every call."""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from .auth import Accounts, Signer
from .errors import LocalHubError
from .faults import Faults
from .files import Disk, read_json
from .repos import Registry
from .settings import Settings
from .xet.cas import CasStore


class Hub:
    """Everything a server needs besides sockets. One process owns a folder at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        root = Path(settings.root).absolute()
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self._lock = _own(root)
        self.disk = Disk(root, settings.fsync)
        identity = self._identity()
        self.data_id: str = identity["id"]
        self.admin_token: str = identity["admin_token"]
        self.accounts = Accounts(settings)
        self.signer = Signer(bytes.fromhex(identity["secret"]), settings.url_seconds)
        self.cas = CasStore(root / "xet", self.disk)
        self.registry = Registry(root, self.disk, self.cas, self.accounts)
        self.faults = Faults()
        for fault in settings.faults:
            self.faults.add(replace(fault))  # a copy: rules count their hits
        self.xet = settings.xet
        self.port = 0
        self.cdn_port = 0

    def _identity(self) -> dict[str, Any]:
        """A random id and keys of this data folder, made once.

        hf_xet caches shards by the CAS url; the id in that url keeps a wiped folder from being taken for the old one.
        """
        path = self.root / "hub.json"
        known = read_json(path)
        if known is None:
            known = {
                "id": secrets.token_hex(8),
                "secret": secrets.token_hex(32),
                "admin_token": f"adm_{secrets.token_hex(16)}",
            }
            self.disk.write_json(path, known)
            os.chmod(path, 0o600)
        return known

    def close(self) -> None:
        """Write what is only in memory and let another process have the folder."""
        self.registry.flush()
        self._lock.close()


def _own(root: Path) -> IO[str]:
    handle = open(root / "lock", "w")  # noqa: SIM115 - held for the life of the hub
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise LocalHubError(f"{root} is served by another process; stop it or choose another --root") from None
    return handle
