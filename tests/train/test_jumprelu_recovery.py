"""JumpReLU finds at least as many of the true features as SAELens' at the same coefficient, steps and data."""

import pytest
import torch

from hubsae.train import SparsityConfig, TrainConfig, train

D, TRUE, BATCH, STEPS = 128, 512, 512, 3000


def features(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse sums of 512 known directions, eight to a token, some frequent and some rare."""
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=torch.Generator().manual_seed(99)), dim=1)
    frequency = 1 / (torch.arange(TRUE) + 8.0) ** 0.7
    frequency *= 8 / frequency.sum()
    g = torch.Generator().manual_seed(seed)
    strength = (torch.rand(rows, TRUE, generator=g) + 0.5) * (torch.rand(rows, TRUE, generator=g) < frequency)
    return strength @ directions, directions


def recovered(W_dec: torch.Tensor, directions: torch.Tensor) -> float:
    """Share of the true directions that some decoder row points along, with a cosine above 0.9."""
    cosines = directions @ torch.nn.functional.normalize(W_dec.detach(), dim=1).T
    return float((cosines.max(1).values > 0.9).double().mean())


def of_saelens(x: torch.Tensor, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    jumprelu = pytest.importorskip("sae_lens.saes.jumprelu_sae")
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(seed)
    sae = jumprelu.JumpReLUTrainingSAE(
        jumprelu.JumpReLUTrainingSAEConfig(d_in=D, d_sae=TRUE, apply_b_dec_to_input=True)
    )
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    for step in range(STEPS):
        at = step * BATCH % len(x)
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x[at : at + BATCH], dead_neuron_mask=torch.zeros(TRUE, dtype=torch.bool),
                coefficients={"l0": 0.05}, n_training_steps=step, is_logging_step=False,
            )
        )  # fmt: skip
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    return sae, sae.W_dec


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jumprelu_recovers_at_least_as_many_true_features_as_saelens():
    held, directions = features(12345, 8192)
    ours, theirs = [], []
    for seed in range(3):
        x, _ = features(seed + 1, 1 << 17)
        c = TrainConfig(
            architecture="jumprelu", d_sae=TRUE, batch_size=BATCH, tokens=STEPS * BATCH, lr=1e-3, loss="sum", seed=seed,
            sparsity=SparsityConfig(l0=0.05), select="last", eval_every=10**6, log_every=10**6,
        )  # fmt: skip
        mine = train(c, x, quiet=True).sae
        peer, W_dec = of_saelens(x, seed)
        assert mine is not None
        with torch.no_grad():
            l0 = [float((sae.encode(held) > 0).sum(1).double().mean()) for sae in (mine, peer)]
        assert l0[0] == pytest.approx(l0[1], rel=0.05)
        ours.append(recovered(mine.W_dec, directions))
        theirs.append(recovered(W_dec, directions))
    assert sum(ours) >= sum(theirs), (ours, theirs)
