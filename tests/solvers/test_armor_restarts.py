"""Rounding in order with static scales against its definition, and the descents that start from it."""

import pytest
import torch
from torch import Tensor

from gram_data import inputs_of, true_error, weight_of
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.rounding import round_groups
from halfplate.formats.spec import WeightSpec
from halfplate.methods import create
from halfplate.pattern import Pattern
from halfplate.solvers.armor.full_gram import GramSchedule, solve_gram
from halfplate.solvers.armor.restarts import DAMPING, Order, restarts, round_in_order
from halfplate.solvers.armor.sweep import Levels
from halfplate.statistics import InputStatistics


def naive(weight: Tensor, gram: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """Round one column after the other; after each, set the columns left to the minimiser of the error, by its normal equations."""
    left = list(gram.diagonal().argsort(descending=True, stable=True))
    damped = gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    each = scales.repeat_interleave(levels.group, 1)
    wanted, found = weight.double(), weight.double().clone()
    while left:
        j = left.pop(0)
        code = levels.quantizer.nearest(found[:, j].float(), each[:, j])
        found[:, j] = levels.quantizer.decode(code, each[:, j]).double()
        fixed = [k for k in range(len(gram)) if k not in {int(other) for other in left}]
        if left:
            rest = torch.stack(left)
            pull = (wanted - found)[:, fixed] @ damped[fixed][:, rest]
            found[:, rest] = wanted[:, rest] + torch.linalg.solve(damped[rest][:, rest], pull.T).T
    return found.float()


@pytest.mark.parametrize("core_dtype", ["int4", "nl4", "int2"])
def test_rounding_in_order_is_that_of_the_definition(core_dtype):
    weight, gram = weight_of(12, 160, 3), inputs_of(160, 4)
    levels = Levels(QUANTIZERS.get(core_dtype), 32)
    _, (scales,) = round_groups(weight, levels.quantizer, 32)
    found = round_in_order(weight, Order.of(gram.float()), (scales.float(),), levels)
    wanted = naive(weight, gram.float(), scales.float(), levels)
    # A value half way between two codes may go to either, and those after it follow.
    assert float((found != wanted).float().mean()) < 0.01


@pytest.mark.parametrize("core_dtype", list(QUANTIZERS))
def test_a_core_without_wrappers_beats_gptq(core_dtype):
    weight, gram = weight_of(48, 160, 5), inputs_of(160, 6)
    spec = WeightSpec(48, 160, Pattern.parse("dense"), core_dtype, group=32)
    assert restarts(spec)
    chain, losses = solve_gram(weight, gram, spec, GramSchedule())
    gptq = create("gptq").compress(weight, InputStatistics(100, gram.diagonal().float(), gram), spec)
    assert true_error(weight, chain.dense(), gram) < true_error(weight, gptq.weight.dense(), gram)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_few_iterations_are_few_rounds(iterations):
    weight, gram = weight_of(16, 64, 5), inputs_of(64, 6)
    spec = WeightSpec(16, 64, Pattern.parse("dense"), "int3", group=32)
    chain, losses = solve_gram(weight, gram, spec, GramSchedule(grid=iterations))
    assert true_error(weight, chain.dense(), gram) < 1
    assert losses


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (WeightSpec(32, 64, Pattern.parse("dense"), "int4"), True),
        (WeightSpec(32, 64, Pattern.parse("dense"), "int4", 16, 16), False),
        (WeightSpec(32, 64, Pattern(2, 4), "int4"), False),
    ],
    ids=["no wrappers", "wrappers", "2:4"],
)
def test_where_restarts_are_used(spec, expected):
    assert restarts(spec) is expected
