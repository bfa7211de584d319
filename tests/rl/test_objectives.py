"""The arithmetic of PPO against slow, obvious references that handle one sequence at a time, without padding."""

from __future__ import annotations

import math

import pytest
import torch

from hubsae.rl.objectives import (
    explained_variance,
    gae,
    masked_mean,
    policy_loss,
    position_ids,
    response_mask,
    token_log_probs,
    token_rewards,
    value_loss,
    whiten,
)

EOS = [2, 9]


@pytest.fixture
def batch():
    """Four responses of different lengths, with rubbish where the padding is."""
    gen = torch.Generator().manual_seed(0)
    lengths = [5, 1, 7, 3]
    mask = torch.zeros(4, 7, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    numbers = [torch.randn(4, 7, generator=gen) for _ in range(4)]
    scores = torch.tensor([1.0, 0.0, 0.5, -1.0])
    return mask, lengths, numbers, scores


def one_by_one_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: the sum over all later steps of (gamma lam)^l times the temporal-difference error."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]


def test_the_response_mask_ends_with_the_first_eos_whichever_it_is():
    response = torch.tensor([[5, 2, 2, 0], [9, 5, 2, 5], [5, 6, 7, 8], [5, 6, 7, 2]])
    for row, mask in zip(response.tolist(), response_mask(response, EOS).tolist(), strict=True):
        first = next((i for i, token in enumerate(row) if token in EOS), len(row) - 1)
        assert mask == [1 if i <= first else 0 for i in range(len(row))]


def test_positions_start_at_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    for row, positions in zip(mask.tolist(), position_ids(mask).tolist(), strict=True):
        expected = iter(range(sum(row)))
        for real, position in zip(row, positions, strict=True):
            if real:
                assert position == next(expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_log_probs_and_entropy_are_those_of_the_sampling_temperature(temperature: float):
    logits = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 6, (3, 4), generator=torch.Generator().manual_seed(2))
    got, entropy = token_log_probs(logits, tokens, temperature)
    for i in range(3):
        for t in range(4):
            weights = [math.exp(v / temperature) for v in logits[i, t].tolist()]
            probs = [w / sum(weights) for w in weights]
            assert got[i, t].item() == pytest.approx(math.log(probs[tokens[i, t]]), abs=1e-5)
            assert entropy[i, t].item() == pytest.approx(-sum(p * math.log(p) for p in probs), abs=1e-5)


def test_kl_is_in_the_reward_of_real_tokens_and_the_score_on_the_last_of_them(batch):
    mask, lengths, (logp, ref, *_), scores = batch
    got = token_rewards(scores, logp, ref, mask, kl_coef=0.3)
    for row, length in enumerate(lengths):
        expected = [-0.3 * (logp[row, t] - ref[row, t]).item() for t in range(length)]
        expected[-1] += scores[row].item()
        assert got[row, :length].tolist() == pytest.approx(expected, abs=1e-6)
        assert not got[row, length:].any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0)])
def test_gae_of_a_padded_batch_is_gae_of_each_sequence_alone(batch, gamma: float, lam: float):
    mask, lengths, (rewards, values, *_), _ = batch
    advantages, returns = gae(rewards * mask, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = one_by_one_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        unwhitened = [a + v for a, v in zip(expected, values[row, :length].tolist(), strict=True)]
        assert returns[row, :length].tolist() == pytest.approx(unwhitened, abs=1e-5)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_whitening_uses_real_tokens_only(batch):
    mask, lengths, (x, *_), _ = batch
    got = whiten(x, mask)
    real = [x[row, t].item() for row, length in enumerate(lengths) for t in range(length)]
    mean = sum(real) / len(real)
    std = math.sqrt(sum((v - mean) ** 2 for v in real) / len(real))
    assert got[mask.bool()].tolist() == pytest.approx([(v - mean) / std for v in real], abs=1e-5)
    assert not got[~mask.bool()].any()
    assert masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-6)


def test_whitening_blows_noise_up_to_full_size_updates(batch):
    mask, _, (x, *_), _ = batch
    assert torch.allclose(whiten(1e-2 * x, mask), whiten(x, mask), atol=1e-2)


def test_the_clipped_objective_token_by_token(batch):
    mask, lengths, (logp, old, advantages, _), _ = batch
    got = policy_loss(logp, old, advantages, mask, clip=0.2)
    total, clipped = 0.0, 0
    for row, length in enumerate(lengths):
        for t in range(length):
            ratio, a = math.exp(logp[row, t] - old[row, t]), advantages[row, t].item()
            objective = min(ratio * a, max(min(ratio, 1.2), 0.8) * a)
            total -= objective
            clipped += objective != ratio * a and abs(objective - ratio * a) > 1e-7
    assert got.loss.item() == pytest.approx(total, rel=1e-5)
    assert got.clipped.item() == clipped > 0


def test_before_the_first_update_nothing_is_clipped_and_the_gradient_is_the_policy_gradient(batch):
    mask, _, (logp, _, advantages, _), _ = batch
    logp = logp.clone().requires_grad_()
    got = policy_loss(logp, logp.detach(), advantages, mask, clip=0.2)
    got.loss.backward()
    assert got.clipped == 0
    assert torch.allclose(logp.grad, -advantages * mask)


def test_the_value_loss_token_by_token(batch):
    mask, lengths, (values, old, returns, _), _ = batch
    expected = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            v, o, r = values[row, t].item(), old[row, t].item(), returns[row, t].item()
            limited = o + max(min(v - o, 0.5), -0.5)
            expected += 0.5 * max((v - r) ** 2, (limited - r) ** 2)
    assert value_loss(values, old, returns, mask, clip=0.5).item() == pytest.approx(expected, rel=1e-5)


def test_explained_variance_sees_real_tokens_only(batch):
    mask, _, (returns, noise, *_), _ = batch
    values = torch.where(mask.bool(), returns, noise * 100)
    assert explained_variance(values, returns, mask) == pytest.approx(1.0)
    assert explained_variance(values + 3, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones_like(returns), mask) == 0.0
