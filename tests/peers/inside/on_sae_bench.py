"""SAEBench's core metrics of every SAE of the release."""

from __future__ import annotations

from importlib.metadata import version

from common import NAMES, WORK, run, tokens, transformer_lens_model
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.sae_bench_utils.general_utils import _standardize_sae_cfg
from sae_lens import SAE, ActivationsStore

MODEL = transformer_lens_model()


def core(name: str) -> str:
    sae = SAE.load_from_disk(WORK / "release" / name)
    _standardize_sae_cfg(sae.cfg)  # as its own loading does
    data = [{"tokens": row} for row in tokens(64, 24)]
    store = ActivationsStore.from_sae(
        MODEL, sae, context_size=24, dataset=data, streaming=False, store_batch_size_prompts=8, n_batches_in_buffer=4,
        train_batch_size_tokens=64, total_tokens=10_000, device="cpu",
    )  # fmt: skip
    config = CoreEvalConfig(
        batch_size_prompts=8, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, context_size=24,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )  # fmt: skip
    metrics, _ = run_evals(sae, store, MODEL, config)
    explained = metrics["reconstruction_quality"]["explained_variance"]
    return f"L0 {metrics['sparsity']['l0']:.1f}, explained variance {explained:.2f}"


run({f"core of {name}": lambda n=name: core(n) for name in NAMES}, version("sae-bench"))
