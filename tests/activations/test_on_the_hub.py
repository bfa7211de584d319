"""A pushed dataset loads with every tool people use, streams, resumes, and survives interrupted pushes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hubsae import localhub
from hubsae.activations import ActivationDataset, ActivationWriter
from hubsae.core.errors import DataError, FormatError, HubSAEError, NotFoundError
from hubsae.hub.activations import open_remote
from hubsae.hub.client import HubClient
from hubsae.hub.datasets import plan_push, push_activations
from hubsae.hub.retry import RetryPolicy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["xet", "lfs+cdn"])
def hub(request, tmp_path_factory):
    xet = request.param == "xet"
    with localhub.running(root=tmp_path_factory.mktemp("hub"), xet=xet, cdn=not xet) as running:
        yield running


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    yield HubClient(token=hub.token, policy=RetryPolicy(base=0.01))
    hub.clear_faults()


def commits(client: HubClient, repo: str) -> list[str]:
    return [c.title for c in client.api.list_repo_commits(repo, repo_type="dataset")]


@pytest.mark.parametrize("name", ["README.md", "layers.6/notes.txt", "parquet"])
def test_what_looks_like_a_secret_stops_a_push_before_anything_is_sent(client, written, hub, tmp_path, name):
    out, token = tmp_path / f"leak-{name.rpartition('.')[2]}", "hf_" + "k" * 34
    if name == "parquet":
        labels = {"note": np.array(["plain", f"token: {token}"], dtype=object)}
        with ActivationWriter(out, d=16, config="layers.6", columns={"note": "string"}) as writer:
            writer.write(torch.ones(2, 16), np.arange(2), np.arange(2), np.full(2, 90), np.zeros(2, bool), **labels)
    else:
        written(name=out.name)
        (out / name).write_text(f"made with {token}")
    before = len(hub.requests)
    with pytest.raises(HubSAEError, match="looks like a secret") as caught:
        push_activations(out, client=client)
    assert token not in str(caught.value) and "--allow-secrets" in str(caught.value)
    assert not [r for r in hub.requests[before:] if r[0] != "GET"]
    assert push_activations(out, client=client, allow_secrets=True).committed


def test_push_fetch_stream_and_push_again(client, written, tmp_path):
    out, _ = written(name="acts", shard_bytes=30_000)
    local = ActivationDataset.open(out)
    done = push_activations(out, client=client)
    assert done.committed and done.repo_id == "local/acts"
    assert not push_activations(out, client=client).committed
    fetched = ActivationDataset.open("local/acts", 6, cache_dir=tmp_path / "c")
    assert torch.equal(fetched.read_all(), local.read_all())
    streamed = ActivationDataset.open(f"local/acts@{done.commit}", 6, stream=True)
    assert torch.equal(streamed.read_all(), local.read_all())
    assert streamed.stats.count == 3000 and torch.equal(streamed.stats.mean, local.stats.mean)
    columns, options = ["sample_id", "position"], {"window_bytes": 20_000}
    for shuffle in (True, False):
        for a, b in zip(
            local.labelled_batches(columns, 333, shuffle=shuffle, **options),
            streamed.labelled_batches(columns, 333, shuffle=shuffle, **options),
            strict=True,
        ):
            assert torch.equal(a.x, b.x) and np.array_equal(a.labels["sample_id"], b.labels["sample_id"])
    # resume in a stream
    got = []
    for number, batch in enumerate(streamed.batches(200, window_bytes=20_000)):
        got.append(batch)
        if number == 4:
            break
    again = ActivationDataset.open("local/acts", 6, stream=True)
    again.load_state_dict(streamed.state_dict())
    rest = list(again.batches(200, window_bytes=20_000))
    assert torch.equal(torch.cat([*got, *rest]), torch.cat(list(local.batches(200, window_bytes=20_000))))
    with pytest.raises(NotFoundError, match=r"no config '7'(.|\n)*layers.6"):
        ActivationDataset.open("local/acts", 7, stream=True)
    with pytest.raises(NotFoundError, match="there is no repo local/nothing"):
        ActivationDataset.open("local/nothing", 7)


def test_a_second_harvest_joins_the_repo_and_replaced_files_go(client, tmp_path, written):
    out, x = written(name="joined", shard_bytes=20_000)
    push_activations(out, client=client)
    with ActivationWriter(tmp_path / "more", d=4, config="layers.9") as writer:
        writer.write(torch.ones(5, 4), sample_id=0)
    push_activations(tmp_path / "more", "local/joined", client=client)
    assert open_remote("local/joined").configs == ["layers.6", "layers.9"]
    whole, _ = written(name="whole")  # the same config in one file
    push_activations(whole, "local/joined", client=client)
    listing = open_remote("local/joined")
    assert len(listing.files("layers.6", "train")) == 1 and listing.configs == ["layers.6", "layers.9"]
    assert len(ActivationDataset.open("local/joined", 6, stream=True)) == len(x)
    card = client.download("local/joined", "README.md", repo_type="dataset").read_text()
    assert "config_name: layers.9" in card and 'open("local/joined"' in card


def test_a_damaged_or_unfinished_folder_is_not_published(client, written):
    out, _ = written(name="broken")
    path = next((out / "layers.6").glob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[60_000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(FormatError, match="checksum"):
        push_activations(out, client=client)
    (out / "layers.6" / ".train-00000-00001.parquet.x.tmp").write_bytes(b"")
    with pytest.raises(DataError, match="was interrupted"):
        plan_push(out, client=client)
    with pytest.raises(DataError, match="no activation dataset"):
        plan_push(out / "layers.6", client=client)
    with pytest.raises(NotFoundError):
        open_remote("local/broken")


def test_failing_and_lost_answers_end_in_one_commit(client, hub, written):
    out, _ = written(name="faulty", shard_bytes=30_000)
    hub.inject_fault("/commit/", method="POST", status=503)
    push_activations(out, client=client)
    hub.clear_faults()
    assert len(commits(client, "local/faulty")) == 2  # the first one makes the repo
    other, _ = written(rows=2000, name="other", shard_bytes=30_000)
    hub.inject_fault("/commit/", method="POST", drop="after", lost_status=504)
    push_activations(other, "local/faulty", client=client)
    assert len(commits(client, "local/faulty")) == 3
    assert len(ActivationDataset.open("local/faulty", 6, stream=True)) == 2000


def test_streaming_survives_a_server_that_stumbles(client, hub, written):
    out, _ = written(name="stumbling", shard_bytes=20_000)
    push_activations(out, client=client)
    data = ActivationDataset.open("local/stumbling", 6, stream=True)
    for source in data.sources:
        source.file.client = client  # hardly any waiting
    hub.inject_fault(".*resolve.*parquet|.*cdn.*|.*lfs.*|.*xet.*", method="GET", status=503, count=3)
    assert torch.equal(data.read_all(), ActivationDataset.open(out).read_all())


PUSH = """
from hubsae.hub.datasets import push_activations
print(push_activations({out!r}).commit)
"""


def test_a_killed_push_is_completed_by_the_next(client, hub, written, tmp_path):
    out, _ = written(name="killed", shard_bytes=20_000)
    environment = {**hub.env(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    hub.inject_fault("/commit/", method="POST", delay=30.0, count=1)
    before = len(hub.requests)
    worker = subprocess.Popen([sys.executable, "-c", PUSH.format(out=str(out))], env=environment)
    uploaded = re.compile(r"xorbs|shards|/lfs|objects/batch")
    while worker.poll() is None and not any(uploaded.search(path) for _, path, _ in hub.requests[before:]):
        time.sleep(0.02)
    time.sleep(0.3)  # somewhere between the first object and the answer to the commit
    assert worker.poll() is None, "the push was over before it could be killed"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    hub.clear_faults()
    assert push_activations(out, client=client).repo_id == "local/killed"
    assert not push_activations(out, client=client).committed
    assert len(commits(client, "local/killed")) == 2
    data = ActivationDataset.open("local/killed", 6, cache_dir=tmp_path / "c")
    assert torch.equal(data.read_all(), ActivationDataset.open(out).read_all())


EVERY_TOOL = """
import sys, numpy as np, torch, datasets, polars, duckdb, pandas
from huggingface_hub import snapshot_download
datasets.disable_progress_bars()
expected = np.load(sys.argv[1])["x"]; repo = "local/tools"
rows = datasets.load_dataset(repo, "layers.6", split="train")
assert np.array_equal(np.array(rows.with_format("numpy")["vector"], dtype=np.float16), expected)
assert rows.features["vector"].length == expected.shape[1]
assert set(datasets.load_dataset(repo, "layers.6")) == {{"train", "validation"}}
stream = datasets.load_dataset(repo, "layers.6", split="train", streaming=True)
seen, state = [], None
for number, row in enumerate(stream):
    seen.append(row["vector"])
    if number == 700:
        state = stream.state_dict()
        break
again = datasets.load_dataset(repo, "layers.6", split="train", streaming=True)
again.load_state_dict(state)
seen += [row["vector"] for row in again]
assert np.array_equal(np.array(seen, dtype=np.float16), expected)
batch = next(iter(stream.with_format("torch").iter(batch_size=100)))
assert batch["vector"].shape == (100, expected.shape[1]) and batch["position"].dtype == torch.int64
folder = snapshot_download(repo, repo_type="dataset")
files = sorted(__import__("glob").glob(folder + "/layers.6/train-*.parquet"))
frame = polars.concat([polars.read_parquet(f) for f in files])
assert np.array_equal(frame["vector"].to_numpy(), expected)
query = f"select count(*), sum(position), max(vector[1]) from read_parquet({{files}}) where is_prompt"
total = duckdb.sql(query).fetchall()[0]
labels = pandas.concat([pandas.read_parquet(f) for f in files])
prompt = labels["is_prompt"].to_numpy()
assert total[0] == prompt.sum() and total[1] == labels["position"][prompt].sum()
assert total[2] == expected[prompt, 0].max()
assert np.array_equal(np.stack(labels["vector"].to_numpy()), expected)
print("every tool agrees")
"""


@pytest.mark.parametrize("hub", ["xet"], indirect=True)
def test_the_pushed_dataset_loads_with_every_tool(client, hub, written, tmp_path):
    from hubsae.activations import SplitRule

    out, _ = written(name="tools", rows=1500, shard_bytes=20_000, split=SplitRule("sample", 0.2))
    push_activations(out, client=client)
    np.savez(tmp_path / "x.npz", x=ActivationDataset.open(out).read_all().numpy())
    environment = {**hub.env(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    code = EVERY_TOOL.replace("{{", "{").replace("}}", "}")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.npz")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "every tool agrees" in done.stdout, done.stderr[-3000:]


def test_offline_the_cache_is_enough(client, hub, written, tmp_path):
    out, _ = written(name="cached", shard_bytes=30_000)
    push_activations(out, client=client)
    expected = ActivationDataset.open("local/cached", 6, cache_dir=tmp_path / "c").read_all()
    offline = ActivationDataset.open("local/cached", 6, cache_dir=tmp_path / "c", local_files_only=True)
    assert torch.equal(offline.read_all(), expected)
    assert os.environ["HF_ENDPOINT"] == hub.url
