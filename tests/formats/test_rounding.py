"""Rounding to a grid: scales and codes against their definition, and what must never happen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.rounding import round_groups, round_rows, round_to_float

BITS = st.sampled_from([8, 4, 3, 2])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def random_values(rows: int, count: int, seed: int, tails: float = 1.0) -> Tensor:
    """Gaussian to the power `tails`: outliers where it is above 1."""
    values = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))
    return values.sign() * values.abs() ** tails


def half_above(value: float) -> float:
    """The least fp16 number that is not below `value`."""
    half = torch.tensor(value, dtype=torch.float64).half()
    if float(half) < value:
        half = (half.view(torch.int16) + 1).view(torch.float16)
    return float(half)


def rounded(values: Tensor, bits: int, width: int) -> tuple[Tensor, Tensor]:
    """q and scales of the uniform quantizer of `bits`."""
    integers, (scales,) = round_groups(values, QUANTIZERS.get(f"int{bits}"), width)
    return integers, scales


def code_range(bits: int) -> tuple[int, int]:
    """-127 to 127 of eight bits, else all that two's complement has."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def restored(integers: Tensor, scales: Tensor, width: int) -> Tensor:
    return integers.double() * scales.double().repeat_interleave(width, 1)[:, : integers.shape[1]]


@given(BITS, st.integers(1, 5), st.integers(1, 300), st.sampled_from([64, 128, 10]), DTYPES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_group_has_the_best_of_the_scales_that_are_tried(
    bits: int, rows: int, count: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    values = random_values(rows, count, seed, tails=1.5).to(dtype)
    integers, scales = rounded(values, bits, width)
    least, greatest = code_range(bits)
    assert (integers.dtype, integers.shape) == (torch.int8, (rows, count))
    assert (scales.dtype, scales.shape) == (torch.float16, (rows, -(-count // width)))
    assert least <= int(integers.min())
    assert int(integers.max()) <= greatest
    found = restored(integers, scales, width)
    for row in range(rows):
        for group in range(scales.shape[1]):
            cut = slice(group * width, (group + 1) * width)
            part = values[row, cut].float()
            unclipped, part = part.abs().max() / greatest, part.double()
            errors = []
            for step in range(16):
                scale = half_above(float(unclipped * (1 - (0.75 if bits == 2 else 0.4) * step / 15)))
                errors.append(float(((part / scale).round().clamp(least, greatest) * scale - part).square().sum()))
            error = float((found[row, cut] - part).square().sum())
            assert error == pytest.approx(min(errors), rel=1e-4)
            assert error <= errors[0] * (1 + 1e-6)


@given(BITS, st.integers(1, 4), st.integers(1, 200), st.integers(0, 99), st.sampled_from([1e-6, 1e-3, 1.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_values_that_are_not_clipped_are_off_by_half_a_step(
    bits: int, rows: int, count: int, seed: int, size: float
) -> None:
    values = random_values(rows, count, seed) * size
    integers, scales = rounded(values, bits, 64)
    least, greatest = code_range(bits)
    step = scales.double().repeat_interleave(64, 1)[:, :count]
    inside = (values >= least * step) & (values <= greatest * step)
    assert bool(((restored(integers, scales, 64) - values).abs() <= step * 0.50001)[inside].all())


def test_outliers_are_clipped_where_that_helps() -> None:
    values = random_values(64, 128, 0)
    integers, scales = rounded(values, 4, 128)
    plain = values.abs().amax(1, keepdim=True) / 7
    unclipped = (values / plain).round() * plain
    errors = [float((values - other).square().sum()) for other in (restored(integers, scales, 128), unclipped)]
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("tails", [1.0, 1.5])
def test_the_scales_that_are_tried_reach_down_to_the_best(bits: int, tails: float) -> None:
    values = random_values(64, 128, 0, tails).double()
    least, greatest = code_range(bits)
    found = restored(*rounded(values, bits, 128), 128)
    errors = []
    for share in torch.linspace(0.05, 1.0, 96).tolist():
        scale = values.abs().amax(1, keepdim=True) / greatest * share
        errors.append(((values / scale).round().clamp(least, greatest) * scale - values).square().sum(1))
    best = torch.stack(errors).amin(0).sum()
    assert float((found - values).square().sum()) < 1.06 * float(best)


def test_groups_of_zeros() -> None:
    values = random_values(3, 256, 0)
    values[1] = 0
    values[2, :128] = 0
    integers, scales = rounded(values, 4, 128)
    assert scales[1].tolist() == [0, 0]
    assert scales[2, 0] == 0
    assert not integers[1].any()
    assert bool((scales[0] > 0).all())


def test_values_below_all_of_fp16_become_zero() -> None:
    integers, scales = rounded(torch.full((2, 128), 1e-12), 8, 128)
    assert not integers.any()
    assert scales.isfinite().all()


def test_chunks_of_rows_change_nothing() -> None:
    values = random_values(600, 512, 0)
    whole = rounded(values, 4, 128)
    for start in (0, 77, 599):
        part = rounded(values[start : start + 1], 4, 128)
        assert all(torch.equal(a[start : start + 1], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("value", [1e9, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_no_scale_holds_is_refused(value: float, bits: int) -> None:
    values = random_values(700, 300, 0)
    values[650, 200] = value
    with pytest.raises(HalfplateError, match=rf"core_dtype='int{bits}' cannot hold .* expected at most .*; use bf16"):
        rounded(values, bits, 128)


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 99), st.sampled_from([1e-9, 1e-7, 1e-5, 1.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_rows_are_off_by_half_a_step(blocks: int, size: int, seed: int, scale: float) -> None:
    matrix = random_values(blocks * size, size, seed).reshape(blocks, size, size) * scale
    integers, scales = round_rows(matrix)
    assert (integers.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float16, (blocks, size))
    assert int(integers.min()) >= -127
    rounded = integers * scales.float()[..., None]
    assert bool(((rounded - matrix).abs() <= 0.50001 * scales.float()[..., None]).all())


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.sampled_from([1.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_the_scale_of_a_row_has_the_least_error_by_energy(blocks: int, size: int, seed: int, tails: float) -> None:
    matrix = random_values(blocks * size, size, seed, tails).reshape(blocks, size, size)
    energy = random_values(blocks, size, seed + 1, 4.0).square().reshape(blocks, 1, size)
    integers, scales = round_rows(matrix, energy=energy)
    assert int(integers.min()) >= -127
    found = ((integers * scales.float()[..., None] - matrix).square() * energy).sum(-1)
    for tile in range(blocks):
        for row in range(size):
            values, errors = matrix[tile, row].double(), []
            for halves in range(11):
                scale = half_above(float(values.abs().max() / 127 * 0.5**halves))
                rounded = (values / scale if scale else values).round().clamp(-127, 127) * scale
                errors.append(float(((rounded - values).square() * energy[tile, 0]).sum()))
            assert float(found[tile, row]) <= min(errors) * (1 + 1e-3) + 1e-12


@pytest.mark.parametrize("value", [1e7, torch.nan, torch.inf])
def test_rows_that_no_scale_holds_are_refused(value: float) -> None:
    matrix = torch.eye(4)[None].clone()
    matrix[0, 1, 1] = value
    with pytest.raises(HalfplateError, match=r"wrapper_dtype='int8' cannot hold .* expected at most 8.32e\+06"):
        round_rows(matrix)


def test_floats() -> None:
    assert round_to_float(torch.ones(2), "bf16", "core_dtype").dtype == torch.bfloat16
    with pytest.raises(HalfplateError, match=r"core_dtype='fp16' cannot hold 1e\+05, .*; use bf16"):
        round_to_float(torch.full((2,), 1e5), "fp16", "core_dtype")
    with pytest.raises(HalfplateError, match=r"core_dtype='bf16' cannot hold inf, .*; scale the weight down"):
        round_to_float(torch.full((2,), torch.inf), "bf16", "core_dtype")
