"""Ratios of layers against loops and sorting, and N of M that keeps the mean."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.allocation.ratios import RATIOS, kept_of_groups, kept_ratios
from halfplate.allocation.ratios.essential import histogram, magnitude
from halfplate.allocation.ratios.farms import spectrum, starts, tail_exponent
from halfplate.allocation.ratios.formats import average, bits_of, family, formats_of
from halfplate.allocation.ratios.owl import outlier_share
from halfplate.budgets.knee import knee_of
from halfplate.pattern import DENSE, Pattern


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


def test_the_smallest_difference_spreads_no_further_than_others() -> None:
    assert kept_ratios([0.0, 5e-324], [1, 1], 0.5, 0.375) == [0.125, 0.875]


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


def test_types_of_more_and_fewer_bits() -> None:
    assert family("nl4") == ["nl3", "nl4", "nl5"]
    assert family("affine4k") == ["affine2k", "affine3k", "affine4k", "affine5k"]
    assert family("int8")[0] == "int2"
    assert family("bf16") == []


@given(SHARES, st.sampled_from(["nl4", "int4", "affine3k", "int8"]), st.floats(0, 0.3), st.data())
@settings(max_examples=50, deadline=None)
def test_bits_are_at_most_those_of_the_recipe(
    shares: list[float], name: str, spread: float, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(shares), max_size=len(shares)))
    ratios = kept_ratios(shares, sizes, average(DENSE, name, 32), spread)
    found = formats_of(ratios, sizes, DENSE, name, 32)
    bits = [bits_of(one.core_dtype, 32) for one in found]
    assert sum(bit * size for bit, size in zip(bits, sizes, strict=True)) <= bits_of(name, 32) * sum(sizes) + 1e-6
    if spread == 0:
        assert {one.core_dtype for one in found} == {name}


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_windows_reach_both_ends(length: int, side: int) -> None:
    side = min(side, length)
    found = list(starts(length, side))
    assert found[0] == 0
    assert found[-1] == length - side or (len(found) == 1 and length == side)
    assert found == sorted(set(found))
    assert len(found) <= 15
    if len(found) < 15:
        assert all(later - earlier <= max(1, side // 2 + 1) for earlier, later in pairwise(found))


def test_the_exponent_of_a_power_law() -> None:
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for exponent in (2.0, 3.5):
        values = (1 - uniform) ** (-1 / (exponent - 1))  # density proportional to x^(-exponent) above 1
        assert tail_exponent(values) == pytest.approx(exponent, rel=0.03)
    assert tail_exponent(torch.ones(5)) == float("inf")


def test_the_shape_of_a_matrix_does_not_matter() -> None:
    """Of whole random matrices it does: that is the bias."""
    generator = torch.Generator().manual_seed(0)
    square, wide = (torch.randn(128, columns, generator=generator) for columns in (128, 512))
    whole = [tail_exponent(torch.linalg.svdvals(weight).square()) for weight in (square, wide)]
    windows = [tail_exponent(spectrum(weight, 64)) for weight in (square, wide)]
    assert abs(whole[0] - whole[1]) > 1
    assert abs(windows[0] - windows[1]) < 0.1
    assert len(spectrum(wide, 64)) == 64 * 3 * 15


def test_heavy_tails_keep_more() -> None:
    generator = torch.Generator().manual_seed(0)
    light = torch.randn(64, 64, generator=generator)
    left, right = (torch.randn(64, 4, generator=generator) for _ in range(2))
    heavy = light + 4 * left @ right.T
    rule = RATIOS.get("farms")
    measured = [rule.measured([layer, layer.T.contiguous()], []) for layer in (heavy, light)]
    assert rule.kept(measured, [1, 1], 0.3, 0.1) == pytest.approx([0.4, 0.2])


@given(st.floats(0.05, 0.95), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_one_magnitude_for_all_layers(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(20, 30, generator=generator) * scale for scale in (1, 0.5, 3)]
    layers[0][0] = 0
    rule = RATIOS.get("essential")
    found = rule.kept([rule.measured([layer[:7], layer[7:]], []) for layer in layers], [600] * 3, share, 0.0)
    values = torch.stack(layers).abs()
    least = values.flatten().sort(descending=True).values[int(share * 1800)]
    expected = [float((layer.abs() > least).double().mean()) for layer in layers]
    assert found == pytest.approx(expected, abs=0.02)
    assert sum(found) / 3 == pytest.approx(share)
    counts = torch.stack([histogram(layer) for layer in layers]).sum(0)
    assert float((values >= magnitude(counts, share)).double().mean()) == pytest.approx(share, abs=0.02)


def test_the_knee_is_before_the_first_large_loss() -> None:
    sparsities = (0.1, 0.2, 0.3, 0.4)
    assert knee_of(2.0, sparsities, (2.0, 2.04, 2.06, 2.03)).sparsity == 0.2
    assert knee_of(2.0, sparsities, (2.01, 2.01, 2.02, 2.05)).sparsity == 0.4
    assert knee_of(2.0, sparsities, (float("nan"), 2.0, 2.0, 2.0)).sparsity == 0
