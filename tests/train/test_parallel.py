"""Two ranks over gloo do what one process does with the same global batch, in both ways of splitting the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hubsae.core.errors import ConfigError
from hubsae.train import AuxConfig, DeadConfig, ResampleConfig, SparsityConfig, TrainConfig, train
from hubsae.train.best import Best

AUX = AuxConfig(k=12)
DEAD = DeadConfig(tokens=600, resample=ResampleConfig(at_steps=(12,), tokens=256))
BASE = {"d_sae": 96, "batch_size": 128, "lr": 1e-3, "epochs": 1, "log_every": 1, "checkpoint_every": 5}
CASES = {
    "topk": {"k": 4},
    "topk aux resample clip": {"k": 2, "aux": AUX, "dead": DEAD, "clip": 0.5},
    "matryoshka": {"k": 4, "matryoshka": (24,)},
    "batch_topk": {"architecture": "batch_topk", "k": 4, "normalize": "mean_std", "loss": "fvu"},
    "jumprelu": {"architecture": "jumprelu", "sparsity": SparsityConfig(l0=0.01, l0_target=4.0, bandwidth=0.05)},
    "relu": {"architecture": "relu", "sparsity": SparsityConfig(l1=0.05), "accumulate": 2},
}


def config(case: str, split: str) -> TrainConfig:
    return TrainConfig(**{**BASE, **CASES[case], "parallel": split})


def tokens() -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randn(2048, 16, generator=g) @ torch.randn(16, 16, generator=g) + 1


CHILD = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_parallel import CASES, config, tokens
from hubsae.train import train
import torch.distributed as dist
from pathlib import Path
from hubsae.train import best
if os.environ["RANK"] != "0":
    best.save_file = None  # what is the same on all ranks is written by the first
for case in CASES:
    train(config(case, sys.argv[2]), tokens(), out=Path(sys.argv[3]) / case, val=tokens()[:256], quiet=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=["data", "latent"])
def ranks(request, tmp_path_factory) -> tuple[str, Path]:
    """All cases trained by two ranks under torchrun, which finds itself a port."""
    out = tmp_path_factory.mktemp(request.param)
    script = out / "child.py"
    script.write_text(CHILD)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
         str(Path(__file__).parent), request.param, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=480,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stdout.decode()
    return request.param, out


@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_have_the_loss_curve_and_the_weights_of_one_process(case, ranks):
    split, out = ranks
    alone = train(config(case, split), tokens(), val=tokens()[:256])
    lines = [json.loads(line) for line in (out / case / "log.jsonl").read_text().splitlines()]
    curve = [line["loss"] for line in lines if line["event"] == "train"]
    expected = [line["loss"] for line in alone.history if line["event"] == "train"]
    assert len(curve) == 16 and curve == pytest.approx(expected, rel=1e-4)
    for name in ("l0", "dead", "fvu"):
        mine = [line[name] for line in lines if line["event"] == "train"]
        assert mine == pytest.approx([line[name] for line in alone.history if line["event"] == "train"], rel=1e-3), name
    resampled = [line["count"] for line in lines if line["event"] == "resample"]
    assert resampled == [line["count"] for line in alone.history if line["event"] == "resample"]
    found = load_file(out / case / "sae" / "sae_weights.safetensors")
    assert alone.sae is not None
    for name, tensor in alone.sae.tensors().items():
        assert float((found[name] - tensor).abs().max()) < 2e-3, name
    evals = [line for line in lines if line["event"] == "eval"]
    assert evals[-1]["val_mse"] == pytest.approx(alone.metrics["val_mse"], rel=1e-3)
    assert evals[-1]["val_dead"] == pytest.approx(alone.metrics["val_dead"], abs=1e-9)


def test_ranks_that_do_not_share_a_folder_are_told_so(tmp_path):
    weights, entry = {"W_enc": torch.ones(2, 2)}, {"step": 1, "value": 0.5}
    with pytest.raises(ConfigError, match="where the first rank wrote it") as error:
        Best(tmp_path / "best", 1).offer(weights, dict(entry), written=True)
    assert "out= on a disk that they share" in str(error.value)
    first, second = (Best(tmp_path / "best", 1) for _ in range(2))
    first.offer(weights, entry)
    second.offer(weights, {"step": 1, "value": 0.5}, written=True)
    assert first.kept == second.kept


def test_latents_that_do_not_split_evenly_are_refused(monkeypatch, tmp_path):
    from hubsae.train import trainer
    from hubsae.train.parallel import Solo

    class Two(Solo):
        world, splits_latents = 2, True

    monkeypatch.setattr(trainer, "connect", lambda split: Two())
    with pytest.raises(ConfigError, match="does not split into 2 ranks"):
        train(TrainConfig(**{**BASE, "d_sae": 97, "k": 4, "parallel": "latent"}), tokens())
