"""The knapsack: never over budget, as good as trying everything, and clear about what cannot be met."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.allocation import Level, allocate
from halfplate.errors import HalfplateError

levels = st.builds(Level, st.integers(0, 10_000).map(float), st.floats(0, 10))


def totals(matrices, chosen):
    picked = [options[index] for options, index in zip(matrices, chosen, strict=True)]
    return sum(level.cost for level in picked), sum(level.loss for level in picked)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(levels, min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0, 1))
def test_as_good_as_trying_everything(matrices, share):
    least = sum(min(level.cost for level in options) for options in matrices)
    most = sum(max(level.cost for level in options) for options in matrices)
    budget = least + share * (most - least)
    cost, loss = totals(matrices, allocate(matrices, budget))
    assert cost <= budget * (1 + 1e-9)
    # Costs are rounded up to a share of the budget, so the best at a slightly smaller budget is the yardstick.
    smaller = budget * (1 - 1e-3)
    tries = [totals(matrices, pick) for pick in product(*(range(len(options)) for options in matrices))]
    reachable = [tried_loss for tried_cost, tried_loss in tries if tried_cost <= smaller]
    if reachable:
        assert loss <= min(reachable) + 1e-9


def test_many_matrices_spend_the_budget_where_it_helps():
    matrices = [[Level(1.0, 1.0 * weight), Level(2.0, 0.5 * weight)] for weight in range(200)]
    chosen = allocate(matrices, 300.0)
    assert chosen == [0] * 100 + [1] * 100


def test_what_cannot_be_met_names_the_least():
    with pytest.raises(HalfplateError, match=r"budget=5 cannot be met, the least is 7; .* cheaper candidates"):
        allocate([[Level(3.0, 0.0)], [Level(4.0, 1.0), Level(9.0, 0.0)]], 5.0)


def test_the_least_budget_is_met():
    matrices = [[Level(1 / 3, 1.0), Level(1.0, 0.0)] for _ in range(500)]
    least = sum(options[0].cost for options in matrices)
    assert allocate(matrices, least) == [0] * 500
