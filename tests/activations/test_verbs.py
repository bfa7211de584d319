"""The command line from a model folder to a published dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest_activations import make_qwen

from hubsae import localhub
from hubsae.activations import ActivationDataset

ROOT = Path(__file__).parents[2]


def run(*arguments: object, env: dict[str, str], code: int = 0) -> str:
    command = [sys.executable, "-m", "hubsae.cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_qwen().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_harvest_push_and_read_back(tmp_path, model_folder):
    texts = tmp_path / "gsm.jsonl"
    lines = [{"question": f"Ann has {n} apples", "answer": f"She has {n} #### {n}"} for n in range(30)]
    texts.write_text("\n".join(json.dumps(line) for line in lines))
    with localhub.running(root=tmp_path / "hub") as hub:
        env = hub.env(tmp_path / "home")
        out = run(
            "harvest", "--model", model_folder, "--dataset", texts, "--layers", "1,3", "--mode", "prompt+response",
            "--out", tmp_path / "acts", "--push", "local/acts", "--validation", "0.2", "--stage", "base", "--json",
            env=env,
        )  # fmt: skip
        info = json.loads(out)
        assert [c["config"] for c in info["configs"]] == ["base.layers.1", "base.layers.3"]
        assert info["configs"][0]["source"]["dataset"] == "gsm.jsonl"
        assert set(info["configs"][0]["splits"]) == {"train", "validation"}
        table = run("push-activations", tmp_path / "acts", "--repo-id", "local/acts", "--dry-run", env=env)
        assert "base.layers.3" in table and "float16 x 32" in table
        again = run("push-activations", tmp_path / "acts", "--repo-id", "local/acts", "--yes", "--json", env=env)
        assert json.loads(again)["committed"] is False
        shown = run("show", "local/acts", env=env)
        assert "base.layers.1" in shown and "token norms" in shown
    data = ActivationDataset.open(tmp_path / "acts", "base.layers.1")
    assert data.info["mode"] == "prompt+response" and data.d == 32


def test_convert_and_errors(tmp_path, model_folder):
    import os

    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    torch.save(torch.randn(50, 6).half(), tmp_path / "ppo_step5_layer2_train.pt")
    out = run(
        "convert-activations", tmp_path / "ppo_step5_layer2_train.pt", "-o", tmp_path / "out", "--model", "m", env=env
    )
    assert "ppo_step5.layers.2" in out and "median norm" in out
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    error = run(
        "harvest", "-m", model_folder, "-d", tmp_path / "texts.txt", "-l", "99", "-o", tmp_path / "x", env=env, code=1
    )
    assert "has no layer 99: it has 4 blocks" in error and "choose a layer from 0 to 3" in error
    assert "Traceback" not in error
    run("harvest", "-m", model_folder, "-d", tmp_path / "texts.txt", "-l", "1", env=env, code=2)
