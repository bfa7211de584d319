"""Run huggingface_hub's own test suite against the local hub, and count.

    python benchmarks/hf_client_suite.py --mode xet          # or lfs+cdn, lfs, xet+cdn
    python benchmarks/hf_client_suite.py --mode lfs+cdn --keep /tmp/suite -- -k test_upload_folder

The published source archive holds the tests but not their conftest.py (it logs in to the maintainers' staging server).
This script fetches the archive of the installed version with pip, points the staging address of the tests at a local
hub that knows their dummy users, adds a conftest with the two fixtures the tests ask for, and runs pytest in a
subprocess. A test counts as talking to the hub when the hub saw a request while it ran. Tests marked `production` (they
need files that exist on the public site only) are left out; tests of storage buckets are counted apart: this hub has no
buckets.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from hubsae.localhub import Org, Token, running

STAGING = "https://hub-ci.huggingface.co"

# the files with tests that talk to a hub (found by a run over all files, `--all`)
HUB_FILES = [
    "hf_api",
    "hf_file_system",
    "cli_discussions",
    "file_download",
    "repocard",
    "copy_files",
    "xet_upload",
    "commit_scheduler",
    "utils_http",
    "hub_mixin",
    "hub_mixin_pytorch",
    "init_lazy_loading",
    "kernels",
    "cli",
    "cache_layout",
    "snapshot_download",
]

# why a test fails that is known to fail: part of its name, modes, reason
KNOWN = (
    ("TestWebhookApi", "xet lfs", "the local hub has no webhooks"),
    ("inference", "xet lfs", "asks the public site about inference providers"),
    ("TestXet", "lfs", "tests the Xet upload or download itself"),
    ("xet", "lfs", "tests the Xet upload or download itself"),
    (
        "test_copy_files_repo_to_repo",
        "lfs",
        "the client copies LFS files between repos only where they have a Xet hash",
    ),
)

CONFTEST = '''
"""Fixtures for huggingface_hub's tests on a local hub (written by benchmarks/hf_client_suite.py)."""

import json
import os
import uuid
from collections.abc import Callable
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from huggingface_hub import HfApi, RepoUrl

from .testing_constants import ENDPOINT_STAGING, TOKEN
from .testing_utils import repo_name

RepoFactory = Callable[..., RepoUrl]


@pytest.fixture(scope="session")
def api() -> HfApi:
    return HfApi(endpoint=ENDPOINT_STAGING, token=TOKEN)


@pytest.fixture
def repo_factory():
    """Make repos, delete them at the end of the test."""
    made = []

    def make(repo_type="model", *, repo_id=None, token=TOKEN, **kwargs) -> RepoUrl:
        client = HfApi(endpoint=ENDPOINT_STAGING, token=token)
        url = client.create_repo(repo_id or repo_name(), repo_type=repo_type, **kwargs)
        made.append((client, url))
        return url

    yield make
    for client, url in made:
        client.delete_repo(url.repo_id, repo_type=url.repo_type, missing_ok=True)


_opener = build_opener(ProxyHandler({}))


def _seen() -> int:
    headers = {"Authorization": "Bearer " + os.environ["LOCAL_HUB_ADMIN"]}
    request = Request(os.environ["LOCAL_HUB_COUNT"], headers=headers)
    with _opener.open(request, timeout=10) as answer:
        return json.load(answer)["count"]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    before = _seen()
    yield
    with open(os.environ["LOCAL_HUB_REPORT"], "a") as out:
        out.write(json.dumps({"test": item.nodeid, "requests": _seen() - before}) + "\\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" or report.outcome != "passed":
        why = str(report.longrepr)[-1500:] if report.outcome == "failed" else ""
        with open(os.environ["LOCAL_HUB_REPORT"], "a") as out:
            line = {"test": item.nodeid, "outcome": report.outcome, "when": report.when, "why": why}
            out.write(json.dumps(line) + "\\n")
'''

INI = """[pytest]
asyncio_mode = auto
markers =
    production: needs the public site
    xet:
    git_lfs:
    inference:
    transfer:
    vcr:
    flaky:
"""


def fetch(work: Path) -> Path:
    """The unpacked source archive of the installed huggingface_hub."""
    name = f"huggingface_hub-{version('huggingface_hub')}"
    if not (work / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "huggingface_hub"]
        subprocess.run([*pip, "-d", str(work), name.replace("huggingface_hub-", "huggingface_hub==")], check=True)
        with tarfile.open(next(work.glob(f"{name}.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
    return work / name


def install_plugins(work: Path) -> Path:
    """pytest plugins the tests need and this project does not."""
    target = work / "plugins"
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, "pytest-mock", "pytest-asyncio"], check=True)
    return target


def point_at(tests: Path, url: str) -> None:
    """Replace the staging server's address in the tests; leave the originals beside them for the next run."""
    originals = tests.parent / "tests.orig"
    if not originals.exists():
        tests.rename(originals)
    tests.mkdir(exist_ok=True)
    for source in originals.rglob("*"):
        target = tests / source.relative_to(originals)
        if source.is_dir():
            target.mkdir(exist_ok=True)
        elif source.suffix == ".py":
            target.write_text(source.read_text().replace(STAGING, url))
        else:
            target.write_bytes(source.read_bytes())
    (tests / "__init__.py").touch()
    (tests / "conftest.py").write_text(CONFTEST)
    (tests.parent / "pytest.ini").write_text(INI)


def constants(tests: Path) -> dict[str, str]:
    """The users and tokens the tests expect."""
    scope: dict[str, str] = {}
    exec((tests / "testing_constants.py").read_text(), scope)
    return scope


def run(mode: str, work: Path, extra: list[str]) -> int:
    source = fetch(work)
    plugins = install_plugins(work)
    originals = source / "tests.orig" if (source / "tests.orig").exists() else source / "tests"
    known = constants(originals)
    tokens = (
        Token(known["USER"], known["TOKEN"], full_name=known["FULL_NAME"]),
        Token(known["OTHER_USER"], known["OTHER_TOKEN"]),
        Token(known["ENTERPRISE_USER"], known["ENTERPRISE_TOKEN"]),
    )
    orgs = (
        Org("valid_org_hub", {known["USER"]: "admin"}, full_name="Dummy Hub Org"),
        Org(known["ENTERPRISE_ORG"], {known["ENTERPRISE_USER"]: "admin", known["USER"]: "write"}, default_private=True),
    )
    report = work / f"report-{mode}.jsonl"
    report.unlink(missing_ok=True)
    with (
        running(xet="xet" in mode, cdn="cdn" in mode, tokens=tokens, orgs=orgs) as hub,
        tempfile.TemporaryDirectory() as home,
    ):
        point_at(source / "tests", hub.url)
        env = hub.env(home, LOCAL_HUB_COUNT=f"{hub.url}/_local/requests", LOCAL_HUB_ADMIN=hub.hub.admin_token)
        env |= {"LOCAL_HUB_REPORT": str(report), "PYTHONPATH": str(plugins)}
        for name in (
            "HF_TOKEN",
            "HF_HUB_DISABLE_PROGRESS_BARS",
            "HF_HUB_DISABLE_TELEMETRY",
            "HF_XET_CACHE",
            "HF_HUB_CACHE",
        ):
            env.pop(name, None)
        if "lfs" in mode:
            env["HF_HUB_DISABLE_XET"] = "1"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "--timeout=300",
            "--continue-on-collection-errors",
        ]
        command += [
            "-p",
            "pytest_mock",
            "-p",
            "pytest_asyncio",
            "-m",
            "not production",
            "-c",
            "pytest.ini",
            *(extra or [f"tests/test_{name}.py" for name in HUB_FILES]),
        ]
        with open(work / f"output-{mode}.txt", "w") as log:
            subprocess.run(command, cwd=source, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    return summarise(mode, report)


def summarise(mode: str, report: Path) -> int:
    """Print the counts and every failure of a test that talked to the hub."""
    requests: dict[str, int] = {}
    outcomes: dict[str, tuple[str, str]] = {}
    for line in report.read_text().splitlines():
        item = json.loads(line)
        if "requests" in item:
            requests[item["test"]] = item["requests"]
        elif outcomes.get(item["test"], ("", ""))[0] != "failed":
            outcomes[item["test"]] = (item["outcome"], item["why"])
    talking = {t for t, n in requests.items() if n > 0}
    buckets = {t for t in talking if "bucket" in t.lower() or "bucket" in outcomes.get(t, ("", ""))[1].lower()}
    table = collections.Counter(outcomes.get(t, ("passed", ""))[0] for t in talking - buckets)
    print(f"\nhuggingface_hub {version('huggingface_hub')}, mode {mode}")
    print(
        f"tests run: {len(requests)}; talked to the hub: {len(talking)}, of these {len(buckets)} about storage buckets"
    )
    print("of the others: " + ", ".join(f"{n} {what}" for what, n in sorted(table.items())))
    for test in sorted(talking - buckets):
        outcome, why = outcomes.get(test, ("passed", ""))
        if outcome == "failed":
            known = [reason for name, modes, reason in KNOWN if name in test and mode[:3] in modes.split()]
            last = why.strip().splitlines()[-1][:200] if why.strip() else ""
            print(f"  FAILED {test}\n         {known[0] if known else 'NEW: ' + last}")
    return table["passed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="xet", choices=("xet", "xet+cdn", "lfs", "lfs+cdn"))
    parser.add_argument("--keep", type=Path, help="work folder to keep (sources, output, report)")
    parser.add_argument("--at-least", type=int, help="exit 1 when fewer tests that talk to the hub pass")
    parser.add_argument("--all", action="store_true", help="run every test file, also those that talk to no hub")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        passed = run(args.mode, work, args.pytest or (["tests"] if args.all else []))
    if args.at_least and passed < args.at_least:
        sys.exit(f"only {passed} passed; expected at least {args.at_least}")


if __name__ == "__main__":
    main()
