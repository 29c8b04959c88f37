"""Rounding in order with static scales against its definition, and the descents that start from it."""

import pytest
import torch
from torch import Tensor

from gram_data import inputs_of, true_error, weight_of
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.rounding import round_groups
from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native
from halfplate.methods import create
from halfplate.pattern import Pattern
from halfplate.solvers.armor import restarts as armor_restarts
from halfplate.solvers.armor.full_gram import GramSchedule, solve_gram
from halfplate.solvers.armor.native_rows import solve_rows
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


@pytest.mark.skipif(not native.available(), reason=native.reason())
@pytest.mark.parametrize("core_dtype", ["int8", "int4", "nl4", "int2", "nl5"])
@pytest.mark.parametrize(("rows", "cols", "group"), [(2, 20, 32), (33, 96, 32), (70, 130, 64), (40, 300, 128)])
def test_the_native_descent_is_that_of_torch(core_dtype, rows, cols, group, monkeypatch):
    weight, gram = weight_of(rows, cols, 7), inputs_of(cols, 8)
    weight[0, :group], gram[3], gram[:, 3] = 0, 0, 0  # a group whose scale is 0, and a dead input
    spec = WeightSpec(rows, cols, Pattern.parse("dense"), core_dtype, group=group)
    fast, losses = solve_gram(weight, gram, spec, GramSchedule())
    monkeypatch.setattr(armor_restarts, "has_native_values", lambda _: False)
    slow, expected = solve_gram(weight, gram, spec, GramSchedule())
    # Rounding may send a value half way between two codes to the other one, and the descent from there ends nearby.
    assert losses[0] == pytest.approx(expected[0], rel=0.02)
    assert losses == sorted(losses, reverse=True)
    assert true_error(weight, fast.dense(), gram) == pytest.approx(true_error(weight, slow.dense(), gram), rel=0.02)


@pytest.mark.skipif(not native.available(), reason=native.reason())
def test_the_native_descent_does_not_depend_on_threads():
    weight, gram = weight_of(100, 96, 9), inputs_of(96, 10).float()
    levels = Levels(QUANTIZERS.get("nl4"), 32)
    _, (scales,) = round_groups(weight, levels.quantizer, 32)
    order, before, found = Order.of(gram), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(solve_rows(weight, gram, order.columns, order.spread, scales.float(), levels, 4, 4))
    torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
