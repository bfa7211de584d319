"""Sums that do not depend on order."""

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubsae.evals.sums import CompensatedSum, FixedPointSum

WIDE = st.floats(min_value=-1e15, max_value=1e15, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-200)


@settings(max_examples=60, deadline=None)
@given(st.lists(WIDE, min_size=1, max_size=200), st.randoms())
def test_compensated_sum_is_the_correctly_rounded_sum_in_any_order(values, random):
    for _ in range(2):
        total = CompensatedSum(1)
        for value in values:
            total.add(torch.tensor([value], dtype=torch.float64))
        assert float(total.value()) == math.fsum(values)
        random.shuffle(values)


def test_a_tie_is_decided_by_what_lies_far_below_it():
    values = [0.0, 349036817276025.0, 997251220930560.0, 3.001175470103435e-18, 2748779069440.0, 902762996409223.2]
    for low in (values[3], -values[3]):
        total = CompensatedSum(1)
        for value in [*values[:3], low, *values[4:]]:
            total.add(torch.tensor([value], dtype=torch.float64))
        assert float(total.value()) == math.fsum([*values[:3], low, *values[4:]])


def test_compensated_sum_merges_and_folds_without_loss():
    values = torch.randn(1000, 3, dtype=torch.float64) * 10 ** torch.randint(-12, 12, (1000, 1)).double()
    whole, halves = CompensatedSum(3), [CompensatedSum(3), CompensatedSum(3)]
    for number, row in enumerate(values):
        whole.add(row)
        halves[number % 2].add(row)
    halves[1].merge(halves[0])
    assert torch.equal(whole.value(), halves[1].value())
    by_row = CompensatedSum(1000, 3)
    by_row.add(values)
    assert torch.equal(by_row.total().value(), whole.value())
    some = torch.tensor([3, 7, 500])
    assert torch.allclose(by_row.total(some).value(), values[some].sum(0), rtol=1e-15)


def test_exact_integers_hold_what_cancels_in_float64():
    total = CompensatedSum(2)
    for value in ([1e16, 0.1], [2.0**-60, 0.2], [-1e16, 5e-324]):
        total.add(torch.tensor(value, dtype=torch.float64))
    whole, unit = total.exact()
    assert Fraction(whole[0], unit) == Fraction(2) ** -60
    assert Fraction(whole[1], unit) == Fraction(0.1) + Fraction(0.2) + Fraction(5e-324)


def test_plain_float64_would_depend_on_the_order():
    values = torch.tensor([1e16, 1.0, -1e16], dtype=torch.float64)
    assert float(values.sum()) != 1.0
    total = CompensatedSum()
    for value in values:
        total.add(value)
    assert float(total.value()) == 1.0


def test_fixed_point_sum_is_exact_and_associative():
    generator = torch.Generator().manual_seed(0)
    where = torch.randint(0, 50, (20_000,), generator=generator)
    values = torch.randn(20_000, generator=generator) * 100
    order = torch.randperm(20_000, generator=generator)
    one, two, other = FixedPointSum(50), FixedPointSum(50), FixedPointSum(50)
    one.add(where, values)
    two.add(where[order[:9000]], values[order[:9000]])
    other.add(where[order[9000:]], values[order[9000:]])
    two.merge(other)
    assert torch.equal(one.parts, two.parts)
    exact = torch.zeros(50, dtype=torch.float64).index_add_(0, where, values.double())
    assert torch.allclose(one.value(), exact, atol=1e-9, rtol=0)
