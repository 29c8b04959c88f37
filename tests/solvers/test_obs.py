"""obs_sweep against textbook OBS with an explicit inverse Hessian for every column."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.rounding import round_groups
from halfplate.pattern import Pattern
from halfplate.solvers.obs import obs_sweep
from halfplate.solvers.selection import keep_largest

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(2, 5), Pattern(1, 3)]


def correlated_gram(d_in: int, seed: int, tokens: int | None = None) -> Tensor:
    """The Gram, fp64 (d_in, d_in), of inputs with unequal scales that share a few directions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * d_in
    shared = torch.randn(tokens, 3, generator=generator) @ torch.randn(3, d_in, generator=generator)
    inputs = shared + torch.randn(tokens, d_in, generator=generator)
    inputs = (inputs * torch.rand(d_in, generator=generator).add(0.1)).double()
    return inputs.T @ inputs / tokens


def swept(*arguments: Any) -> tuple[Tensor, Tensor]:
    found = obs_sweep(*arguments)
    return found.weight, found.mask


def random_weight(d_out: int, d_in: int, seed: int) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    gap = (weight - other).double()
    return float(((gap @ gram.double()) * gap).sum())


def naive_obs(weight: Tensor, gram: Tensor, pattern: Pattern, damping: float) -> tuple[Tensor, Tensor]:
    """Row by row; the inverse Hessian of the columns that are left is downdated after each column."""
    d_out, d_in = weight.shape
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    inverses = []  # of the columns from j on
    inverse = torch.linalg.inv(hessian)
    for _ in range(d_in):
        inverses.append(inverse)
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    result, mask = weight.double().clone(), torch.ones(d_out, d_in, dtype=torch.bool)
    for row in range(d_out):
        for j in range(d_in):
            if j % pattern.m == 0:
                cost = {k: float(result[row, k] ** 2 / inverses[k][0, 0]) for k in range(j, j + pattern.m)}
                for k in sorted(cost, key=lambda k: cost[k])[: pattern.m - pattern.n]:
                    mask[row, k] = False
            if not mask[row, j]:
                result[row, j:] -= result[row, j] / inverses[j][0, 0] * inverses[j][0]
                result[row, j] = 0
    return result, mask


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**16),
    st.sampled_from([1, 8, 12, 128]),
)
@settings(max_examples=30, deadline=None)
def test_equals_textbook_obs(pattern: Pattern, d_out: int, groups: int, seed: int, column_block: int) -> None:
    d_in = groups * pattern.m
    weight, gram = random_weight(d_out, d_in, seed), correlated_gram(d_in, seed)
    found, mask = swept(weight, gram, pattern, 0.01, column_block)
    expected, expected_mask = naive_obs(weight, gram, pattern, 0.01)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_fp32_stays_near_fp64() -> None:
    weight, gram = random_weight(16, 48, 0), correlated_gram(48, 1)
    exact, exact_mask = swept(weight, gram, Pattern(2, 4), 0.01)
    found, mask = swept(weight.float(), gram.float(), Pattern(2, 4), 0.01)
    assert torch.equal(mask, exact_mask)
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-5)


def test_inputs_are_left_as_they_are() -> None:
    for shape in [(1, 8), (3, 8)]:
        weight, gram = random_weight(*shape, 0), correlated_gram(8, 0)
        before = weight.clone(), gram.clone()
        obs_sweep(weight, gram, Pattern(2, 4), 0.0)
        assert torch.equal(weight, before[0])
        assert torch.equal(gram, before[1])


def test_uncorrelated_inputs_need_no_update() -> None:
    weight = random_weight(6, 16, 0)
    diagonal = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    found, mask = swept(weight, diagonal.diag(), Pattern(2, 4), 0.0)
    assert torch.equal(mask, keep_largest(weight.abs() * diagonal.sqrt(), Pattern(2, 4)))
    torch.testing.assert_close(found, torch.where(mask, weight, 0))


def test_output_error_is_below_that_of_wandas_mask() -> None:
    pattern, ratios = Pattern(2, 4), []
    for seed in range(12):
        weight, gram = random_weight(24, 32, seed), correlated_gram(32, seed + 100)
        found, _ = swept(weight, gram, pattern, 0.01)
        wanda = torch.where(keep_largest(weight.abs() * gram.diagonal().sqrt(), pattern), weight, 0)
        ratios.append(output_error(weight, found, gram) / output_error(weight, wanda, gram))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.75


@pytest.mark.parametrize("dead", [[0], [3, 4, 5], [8, 9, 10, 11], list(range(16))])
def test_dead_inputs_get_zero_and_change_nothing_else(dead: list[int]) -> None:
    gram = correlated_gram(16, 0)
    gram[dead] = 0
    gram[:, dead] = 0
    weight = random_weight(5, 16, 0)
    found, mask = swept(weight, gram, Pattern(2, 4), 0.01)
    assert (found[:, dead] == 0).all()
    assert (mask.reshape(5, 4, 4).sum(-1) == 2).all()
    # What a dead input carried must not matter to the living.
    other = weight.clone()
    other[:, dead] = 1e3
    again, again_mask = swept(other, gram, Pattern(2, 4), 0.01)
    assert torch.equal(found, again)
    assert torch.equal(mask, again_mask)


@pytest.mark.parametrize("damping", [0.0, 1e-15, 0.01])
@pytest.mark.parametrize("tokens", [1, 7])
def test_singular_gram_gives_finite_values(tokens: int, damping: float) -> None:
    gram = correlated_gram(32, 0, tokens).float()
    found, mask = swept(random_weight(8, 32, 0).float(), gram, Pattern(2, 4), damping)
    assert found.isfinite().all()
    assert (mask.reshape(8, 8, 4).sum(-1) == 2).all()


def test_indefinite_gram_gives_finite_values() -> None:
    gram = correlated_gram(16, 0)
    gram[0, 1] = gram[1, 0] = 50 * gram.diagonal().mean()
    found, _ = swept(random_weight(8, 16, 0), gram, Pattern(2, 4), 0.01)
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scales_of_weight_and_gram_do_not_matter(scale: float) -> None:
    weight, gram = random_weight(6, 16, 0).float(), correlated_gram(16, 0).float()
    found, mask = swept(weight, gram, Pattern(2, 4), 0.01)
    scaled, scaled_mask = swept(weight * scale, gram * scale, Pattern(2, 4), 0.01)
    assert torch.equal(scaled_mask, mask)
    torch.testing.assert_close(scaled / scale, found, rtol=1e-4, atol=1e-5)


def naive_rounding(weight: Tensor, gram: Tensor, bits: int, group: int = 128) -> Tensor:
    """All weights kept, column by column with an explicit inverse; the scales are those of what stands there at a group's start."""
    d_in = weight.shape[1]
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    result = weight.double().clone()
    quantizer = QUANTIZERS.get(f"int{bits}")
    least, greatest = quantizer.range
    for j in range(d_in):
        if j % group == 0:
            scales = round_groups(result[:, j : j + group], quantizer, group)[1][0].double()
        inverse = torch.linalg.inv(hessian[j:, j:])
        rounded = (result[:, j] / scales[:, 0]).round().clamp(least, greatest) * scales[:, 0]
        error = result[:, j] - rounded
        result[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
        result[:, j] = rounded
    return result


@pytest.mark.parametrize(
    ("name", "bits"), [("int8", 8), ("int6", 6), ("int5", 5), ("int4", 4), ("int3", 3), ("int2", 2)]
)
@pytest.mark.parametrize("pattern", [Pattern(1, 1), Pattern(2, 4)], ids=str)
def test_rounding_in_the_sweep_is_that_of_the_definition(name: str, bits: int, pattern: Pattern) -> None:
    weight, gram = random_weight(5, 24, bits), correlated_gram(24, bits)
    found = obs_sweep(weight, gram, pattern, 0.01, core_dtype=name)
    # The scales come from what stands in the columns when the sweep reaches them, which is the weight itself in the first 128.
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64))
    pivots = torch.linalg.cholesky(inverse, upper=True).diagonal()
    first = keep_largest(weight.abs() / pivots, pattern)
    scales = round_groups(torch.where(first, weight, 0), QUANTIZERS.get(name), 128)[1][0]
    assert torch.equal(found.parameters[0], scales)
    if pattern.is_dense:
        torch.testing.assert_close(found.weight, naive_rounding(weight, gram, bits))
    torch.testing.assert_close(found.integers() * scales.double(), found.weight)
    assert ((found.weight != 0) <= found.mask).all()


@pytest.mark.parametrize("group", [32, 64])
def test_each_group_of_columns_has_the_scale_of_what_stands_there(group: int) -> None:
    weight, gram = random_weight(5, 72, 3), correlated_gram(72, 4)
    found = obs_sweep(weight, gram, Pattern(1, 1), 0.01, core_dtype="int4", group=group)
    torch.testing.assert_close(found.weight, naive_rounding(weight, gram, 4, group))
    assert found.parameters[0].shape == (5, -(-72 // group))
    scales = found.parameters[0].double().repeat_interleave(group, 1)[:, :72]
    torch.testing.assert_close(found.integers() * scales, found.weight)


@pytest.mark.parametrize("name", ["int4", "int3"])
def test_rounding_in_the_sweep_beats_rounding_to_nearest(name: str) -> None:
    ratios = []
    for seed in range(8):
        weight, gram = random_weight(16, 160, seed), correlated_gram(160, seed + 50)
        found = obs_sweep(weight, gram, Pattern(1, 1), 0.01, core_dtype=name)
        codes, (scales,) = round_groups(weight, QUANTIZERS.get(name), 128)
        nearest = codes * scales.double().repeat_interleave(128, 1)[:, :160]
        ratios.append(output_error(weight, found.weight, gram) / output_error(weight, nearest, gram))
    assert max(ratios) < 1
