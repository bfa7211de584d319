"""The arithmetic of PPO, as functions on padded tensors [sequences, response tokens] with a mask of real tokens.

Everything here ignores what lies outside the mask: a padded batch gives what each sequence gives alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def response_mask(response: Tensor, eos_ids: list[int]) -> Tensor:
    """1 for the tokens of a response up to and including its first EOS, 0 after it.

    >>> response_mask(torch.tensor([[5, 2, 0], [5, 6, 7]]), eos_ids=[2])
    tensor([[1, 1, 0],
            [1, 1, 1]])
    """
    ended = torch.isin(response, torch.tensor(eos_ids, device=response.device)).long()
    return (ended.cumsum(1) - ended == 0).long()


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding changes nothing.

    >>> position_ids(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 0, 0, 1, 2]])
    """
    return (mask.cumsum(1) - 1).clamp_min(0)


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, at the sampling temperature.

    `logits` [sequences, tokens, vocabulary] are those that predict `tokens`.

    >>> logp, entropy = token_log_probs(torch.zeros(1, 1, 4), torch.tensor([[2]]))
    >>> round(logp.exp().item(), 3), round(entropy.exp().item(), 3)
    (0.25, 4.0)
    """
    scaled = logits.float() / temperature
    norm = scaled.logsumexp(-1)
    log_probs = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - norm
    # H = log Z - E[logit], which needs no second log-softmax of the vocabulary
    entropy = norm - (torch.softmax(scaled, -1) * scaled).sum(-1)
    return log_probs, entropy


def token_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards: minus `kl_coef` times the k1 estimate of the KL, and the score on the last real token.

    >>> mask = torch.tensor([[1, 1, 0]])
    >>> logp, ref = torch.tensor([[-1.0, -1, -1]]), torch.tensor([[-2.0, -1, -9]])
    >>> token_rewards(torch.tensor([1.0]), logp, ref, mask, 0.5).tolist() == [[-0.5, 1.0, 0.0]]
    True
    """
    rewards = -kl_coef * (log_probs - ref_log_probs) * mask
    last = mask.sum(1) - 1
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (advantage plus value), over real tokens only.

    >>> rewards, values, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[1, 1]])
    >>> gae(rewards, values, mask, gamma=1.0, lam=1.0)[1]
    tensor([[1., 1.]])
    """
    mask = mask.to(values.dtype)
    values = values * mask
    advantage = torch.zeros_like(values[:, 0])
    columns: list[Tensor] = []
    for t in range(values.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(advantage)
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, (advantages + values) * mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens of the whole batch.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]]))
    tensor(2.)
    """
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over real tokens; zero elsewhere.

    Note what it does to noise: advantages that mean nothing come out as large as those that do.

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]])).round(decimals=3).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


class PolicyLoss(NamedTuple):
    """Sums over tokens, to be divided by the tokens of the minibatch."""

    loss: Tensor
    """The clipped objective, negated."""
    clipped: Tensor
    """How many tokens have a clipped ratio in force."""


def policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> PolicyLoss:
    """PPO's clipped surrogate, summed over real tokens.

    >>> one = torch.ones(1, 1)
    >>> policy_loss(0.5 * one, 0 * one, one, one, clip=0.2).loss.round(decimals=3)
    tensor(-1.2000)
    """
    ratio = torch.exp(log_probs - old)
    plain, limited = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return PolicyLoss((torch.maximum(plain, limited) * mask).sum(), ((limited > plain) * mask).sum())


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the squared error of the values, clipped to move at most `clip` from the old ones; summed.

    >>> one = torch.ones(1, 1)
    >>> value_loss(one, 0 * one, 0.9 * one, one, clip=0.5).round(decimals=3)
    tensor(0.0800)
    """
    limited = old + (values - old).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (limited - returns).square())
    return 0.5 * (worse * mask).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 minus the share of the returns' variance that the values miss; 0 is as good as a constant.

    >>> returns, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2)
    >>> explained_variance(returns, returns, mask), explained_variance(0 * returns, returns, mask)
    (1.0, 0.0)
    """
    real = mask.bool()
    missed, there = (returns - values)[real], returns[real]
    variance = there.var(unbiased=False)
    return float(1 - missed.var(unbiased=False) / variance) if variance > 0 else 0.0
