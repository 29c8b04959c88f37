"""RIA with its channel permutation: the same scores, more of them kept."""

import torch
from torch import Tensor

from halfplate.formats import Permutation, WeightSpec
from halfplate.methods import create
from halfplate.methods.ria import relative_importance
from halfplate.pattern import Pattern
from halfplate.statistics import InputStatistics


def problem(seed: int = 0) -> tuple[Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=generator) * torch.rand(64, generator=generator).pow(3)
    return weight, InputStatistics(10, torch.rand(64, generator=generator))


def solved(seed: int, permute: bool, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, what is left of it, and its scores."""
    weight, statistics = problem(seed)
    spec = WeightSpec(32, 64, pattern, "fp32", permuted=permute)
    left = create("ria", permute=permute).compress(weight, statistics, spec).weight.dense()
    return weight, left, relative_importance(weight) * statistics.require_diagonal().sqrt().sqrt()


def test_values_stay_and_more_importance_is_kept() -> None:
    for seed in range(5):
        for pattern in (Pattern(2, 4), Pattern(4, 8)):
            kept = []
            for permute in (False, True):
                weight, left, score = solved(seed, permute, pattern)
                mask = left != 0
                assert torch.equal(left[mask], weight[mask])
                assert int(mask.sum()) == 32 * 64 * pattern.n // pattern.m
                kept.append(float(score[mask].sum()))
            assert kept[1] > kept[0]


def test_the_order_is_stored_and_its_bytes_count() -> None:
    weight, statistics = problem()
    spec = WeightSpec(32, 64, permuted=True)
    chain = create("ria", permute=True).compress(weight, statistics, spec).weight
    assert chain.part(Permutation).order.dtype == torch.int16
    assert chain.nbytes == spec.nbytes == WeightSpec(32, 64).nbytes + 2 * 64
    x = torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(chain.forward(x), x @ chain.dense(torch.float64).T)


def test_a_specification_without_an_order_gets_none() -> None:
    weight, statistics = problem()
    plain, option = (
        create("ria", permute=permute).compress(weight, statistics, WeightSpec(32, 64)).weight.dense()
        for permute in (False, True)
    )
    assert torch.equal(plain, option)
