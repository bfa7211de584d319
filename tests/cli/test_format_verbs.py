"""`hubsae convert`, `show` and `package`, run as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from hubsae import HubSAE, SAEConfig
from hubsae.formats import read, write

CONFIG = SAEConfig(architecture="topk", d_in=16, d_sae=64, k=4)


def run(*args, code=0):
    done = subprocess.run([sys.executable, "-m", "hubsae.cli.main", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def files(tmp_path):
    for layer in (3, 12):
        sae = HubSAE.random(CONFIG, seed=layer)
        write(sae, tmp_path / "saes" / f"sae_base_layer{layer}.pt", "pt")
    return tmp_path / "saes"


def test_package_show_and_convert(files, tmp_path):
    planned = json.loads(
        run("package", files, "--base-model", "a/b", "--hook", "layers.{layer}", "--dry-run", "--json")
    )
    assert [row["id"] for row in planned["saes"]] == ["saes/base/layer3", "saes/base/layer12"]
    assert not (tmp_path / "release").exists()
    asked = run("package", files, "--out", tmp_path / "release", code=1)
    assert "--base-model" in asked and "--hook" in asked
    made = run("package", files, "--out", tmp_path / "release", "--base-model", "a/b", "--hook", "layers.{layer}")
    assert "2 SAEs" in made and "hubsae push" in made
    shown = run("show", tmp_path / "release")
    assert "saes/base/layer12" in shown and "a/b" in shown
    one = tmp_path / "release" / "saes" / "base" / "layer3"
    assert "topk(k=4), then ReLU" in run("show", one)
    run("convert", one, tmp_path / "back.pt", "--to", "pt")
    assert torch.equal(read(tmp_path / "back.pt").W_enc, read(one).W_enc)
    assert "exists" in run("convert", one, tmp_path / "back.pt", "--to", "pt", code=1)


def test_show_says_what_is_not_known(files):
    found = json.loads(run("show", files / "sae_base_layer3.pt", "--json"))
    assert found["config"]["k"] == 4 and found["unknown"] == ["base model", "hook point"]
    torch.save(HubSAE.random(CONFIG).tensors(), files / "bare.pt")
    text = run("show", files / "bare.pt")
    assert "W_enc" in text and "how latents are selected" in text
    assert "topk(k=7)" in run(
        "show", files / "bare.pt", "-s", "architecture=topk", "-s", "k=7", "-s", "apply_b_dec_to_input=true"
    )
    assert "nothing at that path" in run("show", files / "no-such-file.pt", code=1)
    run("show", files / "bare.pt", "-s", "k", code=2)


def test_formats_are_listed():
    rows = {row["name"]: row for row in json.loads(run("formats", "--json"))}
    assert rows["onnx"]["write"] and not rows["onnx"]["read"] and rows["rl_chain"]["read"]
    assert "sae_weights.safetensors" in run("formats")


def test_convert_with_a_key_map(tmp_path):
    sae = HubSAE.random(CONFIG, seed=1)
    t = sae.tensors()
    odd = {"up": t["W_enc"].t().contiguous(), "up_b": t["b_enc"], "down": t["W_dec"], "c": t["b_dec"]}
    torch.save(odd, tmp_path / "o.pt")
    maps = [part for pair in ("W_enc=up.T", "b_enc=up_b", "W_dec=down", "b_dec=c") for part in ("--map", pair)]
    facts = ["-s", "architecture=topk", "-s", "k=4", "-s", "apply_b_dec_to_input=true"]
    run("convert", tmp_path / "o.pt", tmp_path / "out", *maps, *facts)
    assert torch.equal(read(tmp_path / "out").W_enc, sae.W_enc)
