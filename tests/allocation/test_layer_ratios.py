"""OWL's ratios against loops, and N of M that keeps the mean."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.allocation.layer_ratios import kept_of_groups, kept_ratios, outlier_share
from halfplate.pattern import Pattern


@given(st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_outliers_are_counted_over_all_linears_of_a_block(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(k + 1, 5, generator=generator).pow(8) for k in range(count)]
    values = [value for score in scores for value in score.double().flatten().tolist()]
    mean = sum(values) / len(values)
    assert outlier_share(scores) == sum(value > 5 * mean for value in values) / len(values)


def test_a_block_of_zeros_has_no_outliers() -> None:
    assert outlier_share([torch.zeros(3, 4), torch.zeros(1, 4)]) == 0


def test_ratios_of_the_paper() -> None:
    assert kept_ratios([0.0, 0.01, 0.04], [1, 1, 1], 0.5, 0.08) == pytest.approx(
        [0.5 - 0.2 / 3, 0.5 - 0.08 / 3, 0.5 + 0.28 / 3]
    )
    assert kept_ratios([0.02, 0.02], [1, 3], 0.5, 0.08) == [0.5, 0.5]
    assert kept_ratios([0.3], [7], 0.25, 0.08) == [0.25]


SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(SHARES, st.sampled_from([(2, 4), (4, 8), (1, 8), (7, 8), (8, 16), (1, 2)]), st.floats(0, 0.5), st.data())
@settings(max_examples=100, deadline=None)
def test_blocks_together_keep_what_the_pattern_keeps(
    shares: list[float], nm: tuple[int, int], spread: float, data: st.DataObject
) -> None:
    pattern = Pattern(*nm)
    equal = data.draw(st.booleans())
    sizes = (
        [12] * len(shares)
        if equal
        else data.draw(st.lists(st.integers(1, 50), min_size=len(shares), max_size=len(shares)))
    )
    ratios = kept_ratios(shares, sizes, pattern.n / pattern.m, spread)
    mean = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(pattern.n / pattern.m, abs=1e-9)
    assert max(ratios) - min(ratios) <= 2 * spread + 1e-9
    kept = kept_of_groups(ratios, sizes, pattern)
    assert all(1 <= n < pattern.m for n in kept)
    # No block of more outliers gets less than one of fewer.
    order = sorted(range(len(shares)), key=shares.__getitem__)
    if equal:
        for lower, higher in pairwise(order):
            assert kept[lower] <= kept[higher] or ratios[higher] - ratios[lower] < 1e-8
    budget = pattern.n * sum(sizes)
    used = sum(n * size for n, size in zip(kept, sizes, strict=True))
    assert used <= budget
    if equal:
        assert used == budget


def test_what_eighths_and_quarters_can_say() -> None:
    sizes = [10] * 5
    ratios = kept_ratios([0.0, 0.1, 0.5, 0.9, 1.0], sizes, 0.5, 0.08)
    assert kept_of_groups(ratios, sizes, Pattern(4, 8)) == [3, 3, 4, 5, 5]
    assert kept_of_groups(ratios, sizes, Pattern(2, 4)) == [2] * 5  # 8 % are less than half a step of a quarter
    assert kept_of_groups(ratios, sizes, Pattern(8, 16)) == [7, 7, 8, 9, 9]
