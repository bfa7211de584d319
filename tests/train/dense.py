"""The textbook trainer for the tests: dense codes, autograd, torch.optim.Adam; every rule, plainly."""

from __future__ import annotations

import reference
import torch
from torch import Tensor

from hubsae.train.state import Cell


class DenseTrainer:
    """Starts from a cell's weights and takes the same steps the obvious way."""

    def __init__(self, cell: Cell):
        self.config = cell.config
        start = {"W_enc": cell.W_enc, "W_dec": cell.W_dec, **cell.vectors}
        self.params = {name: t.detach().clone().requires_grad_() for name, t in start.items()}
        c = self.config
        self.optimiser = torch.optim.Adam(self.params.values(), lr=c.lr, betas=c.betas, eps=c.eps)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations, codes, and the sparsity penalty of a batch."""
        c, P = self.config, self.params
        center = {"tied": P["b_dec"], "untied": P.get("b_pre"), "none": torch.zeros_like(x[0])}[c.pre_bias]
        product = (x - center) @ P["W_enc"].t()
        pre = product + P["b_enc"]
        penalty = pre.new_zeros(())
        if c.architecture == "topk":
            z = reference.topk_codes(pre, c.k or 0, relu=c.topk_relu)
        elif c.architecture == "batch_topk":
            z = reference.batch_topk_codes(pre, c.k or 0)
        elif c.architecture == "relu":
            z = pre.relu()
            penalty = c.sparsity.l1 * z.sum(1).mean()
        elif c.architecture == "jumprelu":
            theta = P["theta"]
            z = reference.jumprelu_codes(pre, theta, c.sparsity.bandwidth)
            l0 = reference.l0(pre, theta, c.sparsity.bandwidth)
            target = c.sparsity.l0_target
            penalty = c.sparsity.l0 * (l0 if target is None else (l0 / target - 1).square())
        else:
            magnitude = (product * P["r_mag"].exp() + P["b_mag"]).relu()
            z = (pre > 0) * magnitude
            via_gate = pre.relu() @ P["W_dec"].detach() + P["b_dec"].detach()
            scale = 1 / (x.numel() if c.loss == "mean" else x.shape[0])
            penalty = c.sparsity.l1 * pre.relu().sum(1).mean() + (via_gate - x).square().sum() * scale
        return pre, z, penalty

    def loss(self, x: Tensor, dead: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """The whole training loss; `target` is what a transcoder predicts."""
        c, P = self.config, self.params
        pre, z, penalty = self.codes(x)
        width = x.shape[1]
        skip = x @ P["W_skip"].t() if "W_skip" in P else 0
        x = x if target is None else target
        spread = (x - x.mean(0)).square().sum()
        scale = {"mean": 1 / x.numel(), "sum": 1 / x.shape[0], "fvu": 1 / spread}[c.loss]
        prefixes = c.prefixes(pre.shape[1])
        total, out = penalty, x
        for prefix in prefixes:
            out = z[:, :prefix] @ P["W_dec"][:prefix] + P["b_dec"] + skip
            total = total + (out - x).square().sum() * scale / len(prefixes)
        if c.aux is not None and dead is not None and bool(dead.any()):
            k = c.aux.k or width // 2
            target = (x - (out if c.aux.target == "residual" else skip)).detach()
            again = reference.aux_codes(pre, dead, k) @ P["W_dec"]
            again = again if c.aux.target == "residual" else again + P["b_dec"]
            squares = (again - target).square().sum()
            if c.aux.normalize or c.loss == "fvu":
                squares = squares / (target - target.mean(0)).square().sum()
            else:
                squares = squares / (x.numel() if c.loss == "mean" else x.shape[0])
            share = min(1.0, int(dead.sum()) / k) if c.aux.scale_by_dead else 1.0
            total = total + c.aux.coefficient * share * squares
        return total

    def step(self, x: Tensor, dead: Tensor | None = None, target: Tensor | None = None) -> float:
        """One step; the loss before it."""
        c, W = self.config, self.params["W_dec"]
        self.optimiser.zero_grad()
        loss = self.loss(x, dead, target)
        loss.backward()
        with torch.no_grad():
            if c.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.params.values(), c.clip)
            if c.project and W.grad is not None:
                along = (W.grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True)
                W.grad.sub_(along * W)
            self.optimiser.step()
            if "theta" in self.params:
                self.params["theta"].clamp_(min=0)
            if c.unit_norm:
                W.div_(W.norm(dim=1, keepdim=True))
        return float(loss.detach())
