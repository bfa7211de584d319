"""A new on-disk format is one new file: it is detected, read, listed, packaged, pushed and loaded from a hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import hubsae
from hubsae import localhub
from hubsae.core.bundled import bundled
from hubsae.localhub.settings import Token

NEW_FORMAT = '''
"""A folder format that nothing else knows: `weights.odd` (an npz archive) beside `odd.json`."""

from hubsae.core.fold import TrainedTensors
from hubsae.formats.assembling import Found, assemble
from hubsae.formats.base import Files, Format
from hubsae.formats import tensors as io


def detect(probe):
    return "weights.odd beside odd.json" if {"weights.odd", "odd.json"} <= probe.names else None


def read(probe, choices):
    t = io.read_npz(probe.path / "weights.odd")
    trained = TrainedTensors(t["E"], t["D"], t["b"], None, {"b_enc": t["a"]})
    about = probe.json("odd.json")
    return assemble(Found("odd", probe.path / "weights.odd", trained, "topk", k=about["k"], hook=about["at"]), choices)


FORMAT = Format("odd", "an odd format", detect, read, files=(Files(("weights.odd", "odd.json")),))
'''

SCRIPT = """
import sys
from pathlib import Path
import hubsae, torch
from hubsae import HubSAE
from hubsae.formats import detect, read
from hubsae.hub.client import HubClient

pile = Path(sys.argv[1])
assert hubsae.__file__.startswith(sys.argv[3])
print([r.format for r in detect(pile / "layer3")], [r.format for r in detect(pile / "layer3" / "weights.odd")])
sae, x = read(pile / "layer3"), torch.load(sys.argv[2])
print([row["id"] for row in hubsae.list_saes(pile)])
hubsae.push(pile, repo_id="me/odd", base_model="Qwen/Qwen3-8B", check_saelens=False)
print(torch.equal(HubSAE.from_pretrained("me/odd", layer=3)(x), sae(x)))
api = HubClient().api
api.create_repo("me/pile")
api.upload_folder(repo_id="me/pile", folder_path=pile)
print(torch.equal(HubSAE.from_pretrained("me/pile", "layer3")(x), sae(x)))
"""


def test_a_new_folder_format_is_one_new_file(tmp_path: Path):
    import numpy as np

    package = Path(hubsae.__file__).parent
    copy = tmp_path / "copy"
    shutil.copytree(package, copy / "hubsae", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cards", "recipes"):  # what a wheel carries inside the package
        shutil.copytree(bundled(name), copy / "hubsae" / "_data" / name, dirs_exist_ok=True)
    (copy / "hubsae" / "formats" / "kinds" / "odd.py").write_text(NEW_FORMAT)
    for layer in (3, 11):
        folder = tmp_path / "pile" / f"layer{layer}"
        folder.mkdir(parents=True)
        g = np.random.default_rng(layer)
        shapes = {"E": (8, 32), "D": (32, 8), "b": (8,), "a": (32,)}
        with (folder / "weights.odd").open("wb") as file:
            np.savez(file, **{name: g.normal(size=shape).astype("f4") for name, shape in shapes.items()})
        (folder / "odd.json").write_text(f'{{"k": 4, "at": "model.layers.{layer}"}}')
    torch.save(torch.randn(5, 8), tmp_path / "x.pt")
    with localhub.running(root=tmp_path / "hub", tokens=[Token.parse("me=hf_me")]) as hub:
        env = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_XET_CACHE": str(tmp_path / "xet"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(copy),
        }  # fmt: skip
        code = ["-c", SCRIPT, str(tmp_path / "pile"), str(tmp_path / "x.pt"), str(copy)]
        done = subprocess.run([sys.executable, *code], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['odd'] ['odd']", "['layer3', 'layer11']", "True", "True"], done.stdout
