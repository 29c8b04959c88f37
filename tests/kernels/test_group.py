"""Grouped products against a loop over the matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_linears import factors, random_linear

from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.kernels import native
from halfplate.kernels.group import multiply_group
from halfplate.kernels.linear import multiply, pack
from halfplate.pattern import DENSE, Pattern

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

SPARSE = Pattern(2, 4)


# `k` types are packed as their types without super-scales.
STORED_CORES = ("fp32", "bf16", "fp16", "int8", "int6", "int5", "nl5", "int4", "nl4", "int3", "nl3", "int2")


@st.composite
def specs(draw, d_out, d_in):
    """Any matrix of these sizes that has a kernel."""
    return WeightSpec(
        d_out,
        d_in,
        draw(st.sampled_from([SPARSE, DENSE])),
        draw(st.sampled_from(STORED_CORES)),
        draw(st.sampled_from([0, 0, 1, 4, 12, 16])),
        draw(st.sampled_from([0, 0, 1, 4, 12, 16])),
        draw(st.sampled_from(["fp32", "bf16", "int8"])),
        group=draw(st.sampled_from([32, 64, 128])),
    )


def looped(x, packed, counts, widths):
    """The naive reference: one product after the other."""
    parts = x.expand(sum(counts), -1).split(counts) if len(x) == 1 else x.split(counts)
    return torch.cat(
        [
            torch.cat([multiply(rows, matrix, width) for matrix, width in zip(matrices, widths, strict=True)], 1)
            for rows, matrices in zip(parts, packed, strict=True)
        ]
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_a_loop(data):
    d_in = data.draw(st.sampled_from([4, 36, 128, 264]))
    widths = data.draw(st.lists(st.sampled_from([1, 8, 24, 40]), min_size=1, max_size=3))
    counts = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=4))
    activations = data.draw(st.sampled_from(["float", "int8"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    packed, exact, bounds = [], [], []
    x = torch.randn(sum(counts), d_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rows in x.double().split(counts):
        group = [data.draw(specs(width, d_in)) for width in widths]
        tensors = [random_linear(spec, number) for number, spec in enumerate(group)]
        packed.append([pack(spec, own, activations) for spec, own in zip(group, tensors, strict=True)])
        parts = [factors(spec, own) for spec, own in zip(group, tensors, strict=True)]
        exact.append(torch.cat([rows @ (f.out @ f.core @ f.into).T for f in parts], 1))
        bounds.append(torch.cat([rows.abs() @ (f.out.abs() @ f.core.abs() @ f.into.abs()).T for f in parts], 1))
    found = multiply_group(x, packed, counts, widths)
    assert found.dtype == dtype
    # Few cases have enough rows for expanded products of torch, which round differently.
    if max(counts) < 16:
        assert torch.equal(found, looped(x, packed, counts, widths))
    if activations == "float":
        step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        fits = torch.cat(exact).abs() < 0.99 * torch.finfo(dtype).max
        error = (found.double() - torch.cat(exact)).abs()
        assert (error <= 2 * step * torch.cat(bounds) + 1e-7)[fits].all()


def group_of(count, spec=None, **options):
    spec = spec or WeightSpec(24, 128, SPARSE, "int4", 12, 16, "int8", group=32)
    return [[pack(spec, random_linear(spec, seed), **options)] for seed in range(count)]


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_all_groups_may_read_one_row(activations):
    packed, x = group_of(5, activations=activations), torch.randn(1, 128)
    assert torch.equal(multiply_group(x, packed, [1] * 5, [24]), looped(x, packed, [1] * 5, [24]))


def test_no_group_gives_no_rows():
    assert multiply_group(torch.empty(0, 128), [], [], [24, 24]).shape == (0, 48)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_any_number_of_threads_gives_the_same_bits(activations):
    counts, x = [3, 20, 1, 7], torch.randn(31, 128)
    packed, results = group_of(4, activations=activations), []
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        results.append(multiply_group(x, packed, counts, [24]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_nan_and_inf_reach_only_their_own_rows(bad, activations):
    packed, x = group_of(3, activations=activations), torch.randn(26, 128)
    x[4, 7] = bad
    found = multiply_group(x, packed, [2, 20, 4], [24])
    own = torch.arange(26) == 4
    assert not found[own].isfinite().all()
    assert found[~own].isfinite().all()


def test_what_does_not_fit_is_refused():
    packed = group_of(2)
    with pytest.raises(HalfplateError, match=r"x is torch.float32 \(3, 128\)"):
        multiply_group(torch.randn(3, 128), packed, [2, 2], [24])
    with pytest.raises(HalfplateError, match="packed has 2 groups, expected 3"):
        multiply_group(torch.randn(3, 128), packed, [1, 1, 1], [24])
    with pytest.raises(HalfplateError, match="refused its arguments: a buffer has another size"):
        multiply_group(torch.randn(2, 64), packed, [1, 1], [24])
    with pytest.raises(HalfplateError, match="refused its arguments: a buffer has another size"):
        multiply_group(torch.randn(2, 128), packed, [1, 1], [16])
    with pytest.raises(HalfplateError, match="refused its arguments: a size, a position"):
        multiply_group(torch.randn(2, 128), packed, [2, 0], [24])
    with pytest.raises(HalfplateError, match="damaged or was packed by another version"):
        multiply_group(torch.randn(2, 128), [[packed[0][0]], [packed[1][0][:-1].clone()]], [1, 1], [24])
