"""The unmodified Hugging Face clients against the hub: Xet and LFS, with a CDN redirect and without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HUB_CLIENT = r"""
import os, pathlib, sys
import huggingface_hub as hh
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub import HfApi, HfFileSystem, ModelCard

api = HfApi()
assert api.whoami()["name"] == "local"
url = api.create_repo("release")
assert url.repo_id == "local/release" and str(api.create_repo("release", exist_ok=True)) == str(url)
here = pathlib.Path("release"); (here / "saes/layer18").mkdir(parents=True)
files = {
    "README.md": b"---\nlicense: mit\nlibrary_name: hubsae\ntags: [saelens]\n---\n# Card\n",
    "config.json": b"{}",
    "empty.txt": b"",
    "saes/layer18/w.safetensors": os.urandom(900_000),
    "saes/layer18/zeros.bin": bytes(3_000_000),
    "saes/layer18/rows.csv.gz": b"".join(b"%d,%d\n" % (i % 7, i % 11) for i in range(300_000)),
    "dir with space/naïve %23.txt": "ü".encode(),
}
for name, data in files.items():
    path = here / name; path.parent.mkdir(exist_ok=True, parents=True); path.write_bytes(data)
info = api.upload_folder(repo_id="local/release", folder_path=here)
snap = pathlib.Path(hh.snapshot_download("local/release"))
for name, data in files.items():
    assert (snap / name).read_bytes() == data, name
assert snap.name == info.oid
assert api.upload_folder(repo_id="local/release", folder_path=here).oid == info.oid, "unchanged push made a commit"

got = api.model_info("local/release", files_metadata=True)
sizes = {s.rfilename: s.size for s in got.siblings}
assert all(sizes[name] == len(data) for name, data in files.items())
assert got.library_name == "hubsae" and "saelens" in got.tags and "license:mit" in got.tags

pr = api.create_commit("local/release", [
    CommitOperationAdd("new.bin", os.urandom(50_000)),
    CommitOperationCopy("saes/layer18/w.safetensors", "copy.safetensors"),
    CommitOperationDelete("empty.txt")], commit_message="Change things", create_pr=True)
assert pr.pr_num == 1
assert hh.hf_hub_download("local/release", "new.bin", revision="refs/pr/1")
assert not api.file_exists("local/release", "new.bin")
api.merge_pull_request("local/release", 1)
assert api.file_exists("local/release", "copy.safetensors") and not api.file_exists("local/release", "empty.txt")
assert api.get_discussion_details("local/release", 1).status == "merged"

api.create_tag("local/release", tag="v1.0", tag_message="first"); api.create_branch("local/release", branch="next")
assert api.model_info("local/release", revision="v1.0").sha == api.model_info("local/release").sha
fs = HfFileSystem()
assert "local/release/saes" in fs.ls("local/release", detail=False)
with fs.open("local/release/saes/layer18/w.safetensors") as f:
    f.seek(500_000)
    assert f.read(1000) == files["saes/layer18/w.safetensors"][500_000:501_000]
with fs.open("local/release/notes.txt", "w") as f:
    f.write("hello")
assert fs.read_text("local/release/notes.txt") == "hello"
fs.rm("local/release/notes.txt")
card = ModelCard("---\nlicense: mit\n---\n# New"); card.push_to_hub("local/release", commit_message="Card")
assert ModelCard.load("local/release").data.license == "mit"
assert len(api.list_repo_commits("local/release")) == 6
api.super_squash_history("local/release")
assert len(api.list_repo_commits("local/release")) == 1
assert api.move_repo("local/release", "local/renamed") is None
assert api.model_info("local/release").id == "local/renamed"
assert pathlib.Path(hh.hf_hub_download("local/release", "config.json")).read_bytes() == b"{}"
other = api.duplicate_repo("local/renamed", "local/twin")
twin = pathlib.Path(hh.hf_hub_download("local/twin", "copy.safetensors"))
assert twin.read_bytes() == files["saes/layer18/w.safetensors"]
big = api.create_collection("SAEs"); api.add_collection_item(big.slug, "local/twin", "model")
assert [i.item_id for i in api.get_collection(big.slug).items] == ["local/twin"]
"""

OFFLINE = r"""
import pathlib, huggingface_hub as hh
from huggingface_hub import constants
assert constants.HF_HUB_OFFLINE
snap = pathlib.Path(hh.snapshot_download("local/release", revision="REV"))
assert (snap / "saes/layer18/zeros.bin").stat().st_size == 3_000_000
"""

MODES = {"xet": {}, "xet+cdn": {"cdn": True}, "lfs": {"xet": False}, "lfs+cdn": {"xet": False, "cdn": True}}


@pytest.mark.parametrize("mode", MODES)
def test_huggingface_hub_publishes_and_loads(local_hub_factory, script, mode):
    hub = local_hub_factory(**MODES[mode], multipart_threshold=1_000_000, multipart_chunk=700_000)
    script(hub, HUB_CLIENT + "\nprint(info.oid)")
    paths = [path for _, path, _ in hub.requests]
    assert any("/xorbs/" in p for p in paths) == ("xet" in mode)
    assert any("/storage/put/" in p for p in paths) == ("lfs" in mode)
    assert any("/storage/complete/" in p for p in paths) == ("lfs" in mode)
    assert any("/storage/get/" in p for p in paths) == (mode == "lfs+cdn" or mode == "xet+cdn")
    assert not [r for r in hub.requests if r[2] >= 500]


def test_loaded_files_are_there_offline(local_hub, script):
    before = "import sys; sys.argv = ['x']" + HUB_CLIENT.split("pr = api.create_commit")[0]
    revision = script(local_hub, before + "\nprint(info.oid)").split()[-1]
    count = len(local_hub.requests)
    script(local_hub, OFFLINE.replace("REV", revision), HF_HUB_OFFLINE="1")
    assert len(local_hub.requests) == count


def test_a_client_that_turned_xet_off_reads_what_came_by_xet(local_hub, script):
    script(
        local_hub,
        "import os\nfrom huggingface_hub import HfApi\napi = HfApi(); api.create_repo('x')\n"
        "open('w.bin','wb').write(bytes(range(256)) * 9000)\n"
        "api.upload_file(path_or_fileobj='w.bin', path_in_repo='w.bin', repo_id='local/x')",
    )
    assert any("/xorbs/" in path for _, path, _ in local_hub.requests)
    script(
        local_hub,
        "from huggingface_hub import hf_hub_download\n"
        "assert open(hf_hub_download('local/x', 'w.bin'), 'rb').read() == bytes(range(256)) * 9000",
        HF_HUB_DISABLE_XET="1",
    )


def test_the_hf_command_line_works(local_hub, tmp_path):
    env = local_hub.env(tmp_path / "home")
    hf = str(Path(sys.executable).parent / "hf")

    def run(*args: str) -> str:
        done = subprocess.run([hf, *args], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("one")
    (tmp_path / "out" / "w.safetensors").write_bytes(bytes(100_000))
    assert "local" in run("auth", "whoami")
    run("upload", "local/from-cli", "out", ".")
    run("download", "local/from-cli", "--local-dir", "back")
    assert (tmp_path / "back" / "a.txt").read_text() == "one"
    assert (tmp_path / "back" / "w.safetensors").stat().st_size == 100_000
    run("repos", "tag", "create", "local/from-cli", "v1")
    assert "v1" in run("repos", "tag", "list", "local/from-cli")


def test_datasets_push_load_and_stream(local_hub, script):
    pytest.importorskip("datasets")
    script(
        local_hub,
        """
from datasets import Dataset, load_dataset
rows = Dataset.from_dict({"prompt": [f"p{i}" for i in range(1000)], "reward": [i / 10 for i in range(1000)]})
rows.push_to_hub("local/rows", config_name="layers.18", split="train")
rows.select(range(10)).push_to_hub("local/rows", config_name="ppo", split="train", private=False)
back = load_dataset("local/rows", "layers.18", split="train")
assert back[999]["prompt"] == "p999" and len(back) == 1000
assert len(load_dataset("local/rows", "ppo", split="train")) == 10
stream = load_dataset("local/rows", "layers.18", split="train", streaming=True)
assert sum(row["reward"] for row in stream) == sum(i / 10 for i in range(1000))
""",
    )
    assert any(path.startswith("/datasets/local/rows/resolve/") for _, path, _ in local_hub.requests)


def test_transformers_push_and_from_pretrained(local_hub, script):
    pytest.importorskip("transformers")
    code = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
config = Qwen2Config(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, vocab_size=64, max_position_embeddings=32)
model = Qwen2ForCausalLM(config)
model.push_to_hub("local/tiny")
back = Qwen2ForCausalLM.from_pretrained("local/tiny")
assert torch.equal(model.lm_head.weight, back.lm_head.weight)

from huggingface_hub import PyTorchModelHubMixin
class Net(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 4):
        super().__init__(); self.layer = torch.nn.Linear(width, width)
net = Net(8); net.push_to_hub("local/net")
assert torch.equal(Net.from_pretrained("local/net").layer.weight, net.layer.weight)
"""
    script(local_hub, code)
    script(
        local_hub,
        "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained('local/tiny')",
        HF_HUB_OFFLINE="1",
    )
