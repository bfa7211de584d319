"""The encoder's product: the same numbers on every backend, and a fallback that always holds."""

import pytest
import torch
from torch.nn import functional as F

from hubsae.kernels import linear as module
from hubsae.kernels.linear import linear


def test_product_equals_float64_within_float32_rounding_whichever_backend_won():
    x, w, b = torch.randn(64, 96), torch.randn(512, 96), torch.randn(512)
    exact = F.linear(x.double(), w.double(), b.double())
    size = x.norm(dim=1, keepdim=True) * w.norm(dim=1)
    assert ((linear(x, w, b) - exact).abs() <= 3e-7 * 96**0.5 * size + 1e-6).all()


def test_transposed_operands_give_the_same_product():
    big, tall = torch.randn(512, 128), torch.randn(128, 4096)
    torch.testing.assert_close(linear(big, tall.t()), big @ tall, rtol=1e-4, atol=1e-3)
    codes, table = torch.randn(256, 512), torch.randn(256, 300)
    torch.testing.assert_close(linear(codes.t(), table.t()), codes.t() @ table, rtol=1e-4, atol=1e-3)


def test_a_backend_that_rounds_to_bf16_is_refused():
    x, w, b = torch.randn(32, 64), torch.randn(128, 64), torch.randn(128)
    rounded = F.linear(x.bfloat16().float(), w.bfloat16().float(), b)
    assert module._close(F.linear(x, w, b), x, w, b)
    assert not module._close(rounded, x, w, b)


def test_gradients_flow_where_they_are_asked_for():
    x, w = torch.randn(512, 64), torch.randn(4096, 64, requires_grad=True)
    linear(x, w).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, x.sum(0).expand_as(w), rtol=1e-4, atol=1e-3)


def test_decisions_survive_a_restart(monkeypatch):
    monkeypatch.setattr(module, "_decided", {})
    module.adopt([[512, 896, 7168, 1, False, "torch"]])
    assert module.backend(512, 896, 7168, 1) == "torch"
    assert [512, 896, 7168, 1, False, "torch"] in module.decisions()


def test_a_weight_that_lies_the_other_way_is_decided_about_apart(monkeypatch):
    monkeypatch.setattr(module, "_decided", {})
    tried = []
    monkeypatch.setattr(module, "_trial", lambda *shape: tried.append(shape) or "torch")
    x = torch.randn(64, 512)
    for weight in (torch.randn(1024, 512), torch.randn(512, 1024).t()):
        torch.testing.assert_close(module.linear(x, weight), x @ weight.t())
    assert tried == [(64, 512, 1024, False), (64, 512, 1024, True)]


@pytest.mark.skipif(module._operator() is None, reason="this build of torch has no oneDNN product")
@pytest.mark.parametrize(
    ("amd", "onednn", "mkl", "wins"),
    [(True, 1.2, 1.0, "onednn"), (True, 1.4, 1.0, "torch"), (False, 1.0, 1.2, "torch"), (False, 1.0, 1.4, "onednn")],
)
def test_near_a_tie_the_make_of_the_processor_decides_and_not_the_clock(monkeypatch, amd, onednn, mkl, wins):
    clock = iter([onednn, mkl])
    monkeypatch.setattr(module, "fastest", lambda work: next(clock))
    monkeypatch.setattr(module, "_on_amd", lambda: amd)
    assert module._trial(256, 128, 2048) == wins


@pytest.mark.skipif(module._operator() is None, reason="this build of torch has no oneDNN product")
@pytest.mark.parametrize(("amd", "wins"), [(True, "onednn"), (False, "torch")])
def test_a_product_too_short_to_be_timed_goes_by_the_make_alone(monkeypatch, amd, wins):
    monkeypatch.setattr(module, "fastest", lambda work: pytest.fail("it was timed"))
    monkeypatch.setattr(module, "_on_amd", lambda: amd)
    assert module._trial(256, 64, 256) == wins
