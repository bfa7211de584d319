"""What the local hub's tests share: a raw HTTP client, and real clients in a process of their own."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from hubsae.localhub import LocalHub
from hubsae.localhub.pytest_plugin import local_hub, local_hub_factory  # noqa: F401 - fixtures


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Raw:
    """HTTP without a client library in between: paths and headers arrive exactly as written here."""

    def __init__(self, hub: LocalHub, token: str | None = None) -> None:
        self.hub = hub
        self.token = token or hub.token

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | bool | None = None,
        headers: dict[str, str] | None = None,
        port: int | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        if token is not False:
            sent.setdefault("Authorization", f"Bearer {token or self.token}")
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        line = http.client.HTTPConnection("127.0.0.1", port or self.hub.port, timeout=30)
        try:
            line.putrequest(method, path, skip_host="Host" in sent, skip_accept_encoding=True)
            for name, value in sent.items():
                line.putheader(name, value)
            if body is not None and "Content-Length" not in sent:
                line.putheader("Content-Length", str(len(body)))
            line.endheaders(body)
            got = line.getresponse()
            return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            line.close()

    def create(self, repo: str = "local/x", kind: str = "model", **more: Any) -> Answer:
        owner, name = repo.split("/")
        return self("POST", "/api/repos/create", {"name": name, "organization": owner, "type": kind, **more})

    def commit(
        self, files: dict[str, bytes], repo: str = "models/local/x", revision: str = "main", **more: Any
    ) -> Answer:
        """A commit of regular files (None deletes); other keywords go to the header line, `query` to the url."""
        query = more.pop("query", "")
        token = more.pop("token", None)
        lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "change", **more}}]
        for path, content in files.items():
            if content is None:
                lines.append({"key": "deletedFile", "value": {"path": path}})
            else:
                text = base64.b64encode(content).decode()
                lines.append({"key": "file", "value": {"path": path, "content": text, "encoding": "base64"}})
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        return self("POST", f"/api/{repo}/commit/{revision}{query}", body, token=token)

    def lfs(self, content: bytes, repo: str = "local/x") -> str:
        """Upload an LFS object; its sha256."""
        oid = hashlib.sha256(content).hexdigest()
        batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(content)}]}
        line = self("POST", f"/{repo}.git/info/lfs/objects/batch", batch).json["objects"][0]
        if "actions" in line:
            path = "/" + line["actions"]["upload"]["href"].split("/", 3)[3]
            assert self("PUT", path, content, token=False).status == 200
        return oid

    def commit_lfs(self, path: str, content: bytes, repo: str = "local/x") -> str:
        """An LFS file on main; the commit."""
        oid = self.lfs(content, repo)
        lines = [
            {"key": "header", "value": {"summary": "lfs"}},
            {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": len(content)}},
        ]
        got = self("POST", f"/api/models/{repo}/commit/main", "\n".join(map(json.dumps, lines)).encode())
        assert got.status == 200, got
        return got.json["commitOid"]


@pytest.fixture
def hub(local_hub_factory) -> LocalHub:  # noqa: F811
    """A hub with three people and two organisations."""
    return local_hub_factory(
        tokens={"local": "hf_local", "eve": "hf_eve", "ann": "hf_ann"},
        orgs={"lab": {"local": "admin", "ann": "read"}},
    )


@pytest.fixture
def raw(hub) -> Raw:
    return Raw(hub)


@pytest.fixture
def raw_for():
    """Raw clients for hubs made with other settings."""
    return Raw


@pytest.fixture
def script(tmp_path):
    """Run Python code in a fresh process whose Hugging Face clients use a hub; its standard output."""

    def run(hub: LocalHub, code: str, check: bool = True, **env: str) -> str:
        full = hub.env(tmp_path / "home", PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1", **env)
        if not hub.settings.xet:
            full["HF_HUB_DISABLE_XET"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", code], env=full, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def git(hub):
    """What the real git says about a repo of the hub: `git("fsck", "--strict")`."""

    def run(*args: str, repo: str = "local/x") -> str:
        command = ["git", "-c", "safe.directory=*", *args]
        done = subprocess.run(command, cwd=hub.git_path(repo), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
