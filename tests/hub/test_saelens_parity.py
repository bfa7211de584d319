"""Published by hubsae, loaded by stock SAELens in a process where hubsae cannot be imported: the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hubsae import HubSAE, SAEConfig, push
from hubsae.core.normalizer import Normalizer
from hubsae.localhub import LocalHub
from tests.hub.conftest import ABOUT, seed_folder

pytest.importorskip("sae_lens")

# the source modules, in the code of their own cards and repos, and what SAELens makes of the repo
SCRIPT = r"""
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hubsae":
            raise ImportError("hubsae is not installed here")
sys.meta_path.insert(0, Refuse())
try:
    import hubsae
except ImportError:
    pass
else:
    raise SystemExit("hubsae could be imported")
import torch
from sae_lens import SAE
cases = torch.load(sys.argv[1])
report = {}
for name, case in cases.items():
    sae = SAE.from_pretrained(case["repo"], case["id"])
    with torch.no_grad():
        z, x_hat = sae.encode(case["x"]), sae(case["x"])
    error = ((x_hat - case["x_hat"]).norm(dim=-1) / case["x_hat"].norm(dim=-1)).max().item()
    rows = ((z != 0) == (case["z"] != 0)).all(-1).float().mean().item()
    about = sae.cfg.metadata
    report[name] = {"rows": rows, "error": error, "hook": about.hook_name, "model": about.model_name}
print("REPORT" + json.dumps(report))
"""


def topk_source(state: dict, k: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chains' module: top-k of the pre-activations, decoder without b_pre."""
    pre = (x - state["b_pre"]) @ state["encoder.weight"].T + state["encoder.bias"]
    values, indices = pre.topk(k, dim=-1)
    z = torch.zeros_like(pre).scatter_(-1, indices, values)
    return z, z @ state["decoder.weight"].T + state["decoder.bias"]


def threshold_source(state: dict, threshold: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid's module with its batch cut replaced by a threshold: decoder plus b_pre."""
    pre = (x - state["b_pre"]) @ state["encoder.weight"].T + state["encoder.bias"]
    z = pre.relu() * (pre > threshold)
    return z, z @ state["decoder.weight"].T + state["decoder.bias"] + state["b_pre"]


def test_stock_saelens_gives_the_numbers_of_the_source_modules(hub: LocalHub, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    cases: dict[str, dict] = {}

    # TopK, from the chains' pickles
    folder = seed_folder(tmp_path / "chain", (6,), ("ppo_step10",), d_in=32, d_sae=128, k=8)
    push(folder, "me/parity-topk", choices={"topk_relu": True}, **{**ABOUT, "check_saelens": True})
    state = torch.load(folder / "sae_ppo_step10_layer6.pt")["state_dict"]
    x = torch.randn(256, 32, generator=generator)
    z, x_hat = topk_source({n: t.double() for n, t in state.items()}, 8, x.double())
    cases["topk"] = {"repo": "me/parity-topk", "id": "chain/ppo_step10/layer6", "x": x, "z": z, "x_hat": x_hat}

    # BatchTopK, from the grid's bare state dict, with a threshold found on activations
    grid = tmp_path / "grid"
    grid.mkdir()
    decoder = torch.randn(128, 32, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    state = {"b_pre": torch.randn(32, generator=generator) * 0.1, "encoder.weight": decoder,
             "encoder.bias": torch.zeros(128), "decoder.weight": decoder.t().contiguous(),
             "decoder.bias": torch.randn(32, generator=generator) * 0.1}  # fmt: skip
    torch.save(state, grid / "BatchTopK_exp4x_k12.pt")
    torch.save(torch.randn(2048, 32, generator=generator), tmp_path / "acts.pt")
    result = push(grid, "me/parity-batch", activations=tmp_path / "acts.pt",
                  **{**ABOUT, "hook": "model.layers.12", "check_saelens": True})  # fmt: skip
    assert result.plan.rows[0].check.saelens == "same"
    threshold = HubSAE.from_pretrained("me/parity-batch").config.threshold
    assert threshold is not None
    z, x_hat = threshold_source({n: t.double() for n, t in state.items()}, threshold, x.double())
    cases["batch_topk"] = {"repo": "me/parity-batch", "id": "grid/BatchTopK_exp4x_k12", "x": x, "z": z, "x_hat": x_hat}

    # JumpReLU with a normaliser folded in, and one SAE at the root
    sae = HubSAE.random(SAEConfig(architecture="jumprelu", d_in=32, d_sae=128), seed=5)
    mean, std = torch.randn(32, generator=generator) * 3, torch.rand(32, generator=generator) * 4 + 0.1
    from hubsae.core.fold import TrainedTensors, fold

    biases = {"b_enc": sae.b_enc.detach()}
    trained = TrainedTensors(sae.W_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach(), None, biases, None)
    tensors, subtract = fold(trained, mean, std)
    config = sae.config.model_copy(update={"apply_b_dec_to_input": subtract})
    tensors["threshold"] = sae.threshold.detach()
    folded = HubSAE(config, tensors, normalizer=Normalizer(mean, std, 1000))
    folded.metadata.base_model.id, folded.metadata.hook.module_path = "a/b", "model.layers.3"
    folded.metadata.hook.transformer_lens = "blocks.3.hook_resid_post"
    folded.push_to_hub("me/parity-jump", check_saelens=True)
    x = mean + std * torch.randn(256, 32, generator=generator)
    wide = {n: t.double() for n, t in sae.tensors().items()}
    n = (x.double() - mean.double()) / std.double()
    pre = n @ wide["W_enc"] + wide["b_enc"]
    z = pre.relu() * (pre > wide["threshold"])
    x_hat = (z @ wide["W_dec"] + wide["b_dec"]) * std.double() + mean.double()
    cases["jumprelu"] = {"repo": "me/parity-jump", "id": ".", "x": x, "z": z, "x_hat": x_hat}

    torch.save(cases, tmp_path / "cases.pt")
    env = hub.env(tmp_path / "child", HF_TOKEN="hf_me", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "cases.pt")],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("REPORT")), None)
    assert line is not None, done.stderr[-3000:]
    report = json.loads(line.removeprefix("REPORT"))
    for name, found in report.items():
        assert found["rows"] == 1.0, (name, found)
        assert found["error"] <= 1e-6, (name, found)
    assert report["topk"]["hook"] == "blocks.6.hook_resid_post"
    assert report["topk"]["model"] == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize(("scale", "told"), [(1.0, False), (2.0, True)])
def test_a_topk_whose_rows_are_not_of_norm_one_says_who_refuses_it(scale, told, tmp_path):
    from hubsae.formats import native
    from hubsae.hub.trial import verify

    sae = HubSAE.random(SAEConfig(architecture="topk", d_in=16, d_sae=64, k=4))
    with torch.no_grad():
        sae.W_dec *= scale
    sae.save_pretrained(tmp_path)
    notes = verify("sae", tmp_path, native.read(tmp_path), sae, with_saelens=False).notes
    assert any("SAEDashboard and Neuronpedia's runner refuse it" in note for note in notes) == told
