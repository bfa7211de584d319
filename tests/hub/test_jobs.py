"""A job for Hugging Face as the real client sends it, recorded by a server that answers for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hubsae.core.errors import ConfigError
from hubsae.hub.jobs import submit

REQUEST = {
    "command": ["uv", "run", "launch_pickled_pipeline", "hf://buckets/me/shelf/acts/.tasks/harvest/executor.pik"],
    "image": "uv:python3.11", "flavor": "a10g-small", "timeout": "2h", "namespace": "me",
    "env": {"DATATROVE_JOB_ARRAY_INDEX": "3"}, "secrets": ["HF_TOKEN", "OTHER_KEY"],
    "labels": {"hubsae": "harvest", "task": "3"},
    "volumes": [{"type": "bucket", "source": "me/shelf", "mount_path": "/data"}],
}  # fmt: skip


def test_what_is_sent_holds_the_bucket_and_the_values_of_the_secrets():
    got = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, self.headers["Authorization"], body))
            answer = {
                "id": "job7",
                "status": {"stage": "SCHEDULING", "message": None},
                "owner": {"id": "1", "name": "me", "type": "user"},
            }
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"from hubsae.hub.jobs import submit; print(submit({REQUEST!r}, token='hf_test'))"
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "OTHER_KEY": "other"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "job7"
    ((path, authorization, sent),) = got
    assert (path, authorization) == ("/api/jobs/me", "Bearer hf_test")
    assert sent["command"] == REQUEST["command"] and sent["environment"] == REQUEST["env"]
    assert sent["secrets"] == {"HF_TOKEN": "hf_test", "OTHER_KEY": "other"}
    assert (sent["flavor"], sent["timeoutSeconds"]) == ("a10g-small", 7200)
    assert sent["volumes"] == [{"type": "bucket", "source": "me/shelf", "mountPath": "/data"}]
    assert REQUEST["labels"].items() <= sent["labels"].items()


def test_a_secret_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(ConfigError, match="the secret OTHER_KEY is not set"):
        submit(REQUEST, token="hf_test")
