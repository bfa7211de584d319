"""What a person sees: the web pages, and the server started from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

CARD = b"""---
license: mit
library_name: hubsae
---
# My SAEs

<script>alert(1)</script>

See <!-- generated --> <script>alert(2)</script> [bad](javascript:alert(1)) [good](a.txt) ![plot](plots/p.png)

| layer | L0 |
|---|---|
| 18 | 64 |
<!-- end of generated -->
"""


def test_pages_show_what_was_pushed(raw):
    raw.create()
    raw.create("local/hidden", private=True)
    raw.commit({"README.md": CARD, "a.txt": b"<b>text</b>", "sub/b.txt": b"2"})
    raw.commit_lfs("w.bin", b"weights")
    raw.commit({"c.txt": b"line\n"}, query="?create_pr=1", summary="Propose <i>c</i>")
    index = raw("GET", "/", token=False)
    assert b"local/x" in index.body and b"local/hidden" not in index.body and b"license:mit" in index.body
    assert b"local/hidden" in raw("GET", "/").body
    page = raw("GET", "/local/x", token=False).body.decode()
    assert "<h1>My SAEs</h1>" in page and "<td>64</td>" in page
    assert "<script" not in page and 'href="javascript' not in page
    assert 'href="/local/x/blob/main/a.txt"' in page and 'src="/local/x/resolve/main/plots/p.png"' in page
    files = raw("GET", "/local/x/tree/main", token=False).body.decode()
    assert all(name in files for name in ("a.txt", "sub/", "w.bin", "LFS"))
    assert "&lt;b&gt;text" in raw("GET", "/local/x/blob/main/a.txt").body.decode()
    commits = raw("GET", "/local/x/commits/main").body.decode()
    assert "initial commit" in commits
    assert "Propose &lt;i&gt;" in raw("GET", "/local/x/discussions").body.decode()
    pull = raw("GET", "/local/x/discussions/1").body.decode()
    assert "refs/pr/1" in pull
    sha = raw("GET", "/api/models/local/x/refs?include_prs=1").json["pullRequests"][0]["targetCommit"]
    assert "+line" in raw("GET", f"/local/x/commit/{sha}").body.decode()


def test_pages_forbid_scripts_and_missing_ones_are_404(raw):
    raw.create()
    assert "script-src" not in raw("GET", "/").headers["content-security-policy"]
    assert raw("GET", "/").headers["content-security-policy"].startswith("default-src 'none'")
    assert raw("GET", "/local/nothing").status == 404
    assert raw("GET", "/local/x/tree/main/nothing").status == 404
    assert raw("GET", "/login", token=False).headers["www-authenticate"].startswith("Basic")


@pytest.fixture
def served(tmp_path):
    """`hubsae hub serve` in a process of its own: its url and token, as it prints them."""
    running = []

    def start(*args: str) -> tuple[str, str]:
        command = [
            sys.executable,
            "-m",
            "hubsae.cli.main",
            "hub",
            "serve",
            "--root",
            str(tmp_path / "data"),
            "--port",
            "0",
            *args,
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if "HF_ENDPOINT=" in line:
                words = dict(word.split("=", 1) for word in line.split() if "=" in word)
                return words["HF_ENDPOINT"], words["HF_TOKEN"]
        raise AssertionError("the server did not say where it is")

    yield start
    for process in running:
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()


def get(url: str, token: str | None = None) -> dict:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        return json.load(answer)


def test_serve_prints_what_to_set_and_faults_work(served, tmp_path):
    url, token = served("--no-xet", "--org", "lab=local")
    got = get(f"{url}/api/whoami-v2", token)
    assert got["name"] == "local" and got["orgs"][0]["name"] == "lab"
    assert get(f"{url}/_local/health") == {"ok": True, "xet": False, "cdn": False}
    assert (
        oct(os.stat(tmp_path / "data" / "token").st_mode)[-3:]
        == oct(os.stat(tmp_path / "data" / "hub.json").st_mode)[-3:]
        == "600"
    )
    fault = [sys.executable, "-m", "hubsae.cli.main", "hub", "fault", "--root", str(tmp_path / "data"), "--url", url]
    subprocess.run([*fault, "GET:/api/whoami:503"], check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(f"{url}/api/whoami-v2", token)
    subprocess.run([*fault, "*:/api/whoami:503:*"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*fault, "clear"], check=True, stdout=subprocess.DEVNULL)
    assert get(f"{url}/api/whoami-v2", token)["name"] == "local"


def test_serve_refuses_nonsense_with_one_message(tmp_path):
    for args in (["--token", "nonsense"], ["--fault", "nonsense"], ["--org", "=x"]):
        command = [
            sys.executable,
            "-m",
            "hubsae.cli.main",
            "hub",
            "serve",
            "--root",
            str(tmp_path / "d"),
            "--port",
            "0",
            *args,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "Traceback" not in done.stderr and "expected" in done.stderr


def test_the_plugin_serves_a_whole_run(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_one(session_hub):\n"
        "    from huggingface_hub import create_repo, whoami\n"
        "    assert whoami()['name'] == 'local' and create_repo('x').startswith(session_hub.url)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "-p",
        "hubsae.localhub.pytest_plugin",
        "--local-hub=lfs+cdn",
        "test_it.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_missing_package_is_named_with_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['blake3'] = None\n"
        "from hubsae.localhub import running, LocalHubError\n"
        "try:\n    running().__enter__()\nexcept LocalHubError as why:\n    print(why)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "blake3" in done.stdout and "hubsae[hub]" in done.stdout, done.stderr
