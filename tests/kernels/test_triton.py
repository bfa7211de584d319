"""The Triton kernels against the reference, in the interpreter (TRITON_INTERPRET=1) where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CHECK = """
import sys, torch
sys.path.insert(0, "tests")
import reference
from hubsae.kernels import cpu, using
from hubsae.kernels.active import ActiveSet
from hubsae.train import TrainConfig, train

device = "cuda" if torch.cuda.is_available() else "cpu"
g = torch.Generator().manual_seed(0)
for rows, n, d, nnz in ((6, 20, 5, 31), (4, 9, 1500, 0), (5, 7, 1100, 12), (1, 3, 8, 3)):
    flat = torch.randperm(rows * n, generator=g)[:nnz].sort().values
    active = ActiveSet.from_entries(flat // n, flat % n, torch.randn(nnz, generator=g), rows, n)
    active = ActiveSet(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in active))
    W, residual, x = (torch.randn(s, d, generator=g).to(device) for s in (n, rows, rows))
    with using("triton"):
        out = cpu.decode(active, W)
        found = reference.sparse_gradients(active.by_latent(), residual, x, W)
    torch.testing.assert_close(out, reference.decode(active, W), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found, reference.gradients(active.by_latent(), residual, x, W), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

data = torch.randn(64, 8, generator=g)
saes = [
    train(TrainConfig(d_sae=16, k=2, batch_size=16, lr=1e-2, epochs=1, kernels=k), data, device=device).sae
    for k in ("torch", "triton")
]
torch.testing.assert_close(saes[0].W_dec, saes[1].W_dec, rtol=1e-3, atol=1e-4)
print("equal")
"""


def test_triton_kernels_equal_the_reference_and_train_the_same_sae():
    # the interpreter is chosen when triton is imported, hence a process of its own
    environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr
