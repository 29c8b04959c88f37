"""normalise against loops over the elements."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.solvers.normalise import normalise


def naive_normalise(weight: list[list[float]]) -> tuple[list[list[float]], list[float], list[float]]:
    d_out, d_in = len(weight), len(weight[0])
    columns = [math.sqrt(sum(weight[i][j] ** 2 for i in range(d_out))) or 1.0 for j in range(d_in)]
    scaled = [[weight[i][j] / columns[j] for j in range(d_in)] for i in range(d_out)]
    rows = [math.sqrt(sum(value**2 for value in row)) or 1.0 for row in scaled]
    return [[value / rows[i] for value in row] for i, row in enumerate(scaled)], rows, columns


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=30, deadline=None)
def test_equals_loops(d_out: int, d_in: int, seed: int, scale: float) -> None:
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)) * scale
    found = normalise(weight)
    expected, rows, columns = naive_normalise(weight.double().tolist())
    torch.testing.assert_close(found.weight, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.rows, torch.tensor(rows), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.columns, torch.tensor(columns), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.rows[:, None] * found.weight * found.columns, weight, rtol=1e-5, atol=0)


def test_zero_rows_and_columns_keep_scale_one() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[:, 2] = 0
    found = normalise(weight)
    assert found.rows[1] == 1
    assert found.columns[2] == 1
    assert found.weight.isfinite().all()
    norms = found.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalise(weight * scale).weight, normalise(weight).weight)


def test_the_dtype_is_kept() -> None:
    found = normalise(torch.ones(2, 3, dtype=torch.float64))
    assert {found.weight.dtype, found.rows.dtype, found.columns.dtype} == {torch.float64}
