"""SLiM's low-rank part: the best under the second moments, and what it gains."""

import torch

from halfplate.formats import LowRank, WeightSpec
from halfplate.methods import create
from halfplate.statistics import InputStatistics

SPEC = WeightSpec(24, 40, core_dtype="fp32", wrapper_dtype="fp32", rank=6)


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, 40, generator=generator), torch.rand(40, generator=generator) + 0.05


def weighted(error, moments):
    return float((error.square() * moments).sum())


def test_more_rank_loses_less_and_all_of_it_loses_nothing():
    weight, moments = problem()
    errors = []
    for rank in (0, 2, 6, 24, 30):
        spec = WeightSpec(24, 40, core_dtype="fp32", wrapper_dtype="fp32", rank=rank)
        solved = create("slim").compress(weight, InputStatistics(10, moments), spec).weight.dense()
        errors.append(weighted(weight - solved, moments))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8 * errors[0]
    assert errors[-2] < 1e-8 * errors[0]


def test_without_a_rank_it_is_wanda():
    weight, moments = problem()
    spec = WeightSpec(24, 40)
    statistics = InputStatistics(10, moments)
    slim, wanda = (create(name).compress(weight, statistics, spec).weight.dense() for name in ("slim", "wanda"))
    assert torch.equal(slim, wanda)


def test_no_small_change_of_the_low_rank_part_is_better():
    weight, moments = problem(1)
    solved = create("slim").compress(weight, InputStatistics(10, moments), SPEC).weight
    kept = solved.core.mask()
    # The low-rank part was the best for what pruning took, before the kept values were taken again.
    target = torch.where(kept, 0, weight)
    left, right = solved.part(LowRank).left, solved.part(LowRank).right
    best = weighted(target - left @ right, moments)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        moved = left + 1e-2 * torch.randn(left.shape, generator=generator)
        assert weighted(target - moved @ right, moments) >= best
        moved = right + 1e-2 * torch.randn(right.shape, generator=generator)
        assert weighted(target - left @ moved, moments) >= best


def test_inputs_never_seen_do_no_harm():
    weight, moments = problem(2)
    moments[::5] = 0
    assert create("slim").compress(weight, InputStatistics(10, moments), SPEC).weight.dense().isfinite().all()
    zero = InputStatistics(10, torch.zeros(40))
    assert create("slim").compress(weight, zero, SPEC).weight.dense().isfinite().all()
