"""Matrices that share an input wrapper: cut from one stacked solution exactly, and refused where they do not fit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, InWrapper, WeightSpec, check_shared, connect
from halfplate.formats.sharing import share, sharing_groups, split, stacked, stacked_spec
from halfplate.methods import create
from halfplate.pattern import DENSE, Pattern
from halfplate.statistics import InputStatistics

CORES = st.sampled_from([(Pattern(2, 4), "bf16"), (Pattern(4, 8), "int4"), (DENSE, "int3"), (Pattern(1, 4), "int8")])


def solved(weights, specs, objective="gram"):
    x = torch.randn(100, specs[0].d_in, generator=torch.Generator().manual_seed(5)).double()
    gram = x.T @ x / len(x)
    method = create("armor", iterations=2, grid_iterations=2, objective=objective)
    return method.compress(
        stacked(weights, specs), InputStatistics(100, gram.diagonal().float(), gram), stacked_spec(specs)
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from([0, 1, 8, 16]),
    st.sampled_from([8, 16]),
    CORES,
    st.sampled_from(["bf16", "int8"]),
)
def test_a_stack_is_split_exactly(sizes, out_block, in_block, core, wrapper_dtype):
    specs = [WeightSpec(d_out, 48, *core, out_block, in_block, wrapper_dtype) for d_out in sizes]
    specs = [specs[0], *(replace(spec, in_shared="first") for spec in specs[1:])]
    generator = torch.Generator().manual_seed(sum(sizes))
    weights = [torch.randn(d_out, 48, generator=generator) for d_out in sizes]
    whole = solved(weights, specs).weight
    parts = split(whole, specs)
    # Rows of zeros stand between the matrices, up to whole blocks of A, and come out as zeros.
    dense, starts = whole.dense(torch.float64), [0]
    for size in sizes:
        starts.append(starts[-1] + (-(-size // out_block) * out_block if out_block else size))
    for part, spec, weight, start, end in zip(parts, specs, weights, starts, starts[1:], strict=False):
        torch.testing.assert_close(part.dense(torch.float64), dense[start : start + spec.d_out], rtol=1e-12, atol=1e-12)
        assert not dense[start + spec.d_out : end].any()
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.tensors().items()}
        assert shapes == spec.layout()
        assert part.nbytes == spec.nbytes
        assert part.part(InWrapper) is parts[0].part(InWrapper)
        error = (part.dense() - weight).norm() / weight.norm()
        assert error < 0.8, error


def test_bytes_of_a_shared_wrapper_count_once():
    alone = WeightSpec(32, 64, out_block=16, in_block=16)
    specs = share(dict.fromkeys("qkvo", alone), [["q", "k", "v"], ["o"]])
    assert sum(spec.nbytes for spec in specs.values()) == 4 * alone.nbytes - 2 * (2 * 64 * 16)
    assert [spec.in_shared for spec in specs.values()] == [None, "q", "q", None]
    assert specs["k"].alone == alone
    assert sharing_groups(specs) == [["q", "k", "v"], ["o"]]
    # A follower may stand before its lender, and the lender outside of what is asked for.
    assert sharing_groups({name: specs[name] for name in "kqo"}) == [["q", "k"], ["o"]]


def test_no_wrapper_is_not_shared():
    bare = WeightSpec(32, 64, out_block=16)
    assert share({"q": bare, "k": bare}, [["q", "k"]]) == {"q": bare, "k": bare}
    with pytest.raises(HalfplateError, match="in_shared='q' with in_block=0 shares no wrapper"):
        replace(bare, in_shared="q")


@pytest.mark.parametrize(
    ("lender", "message"),
    [
        ({}, "names no compressed module"),
        ({"q": {"in_shared": "k"}}, "stores no input wrapper of its own"),
        ({"q": {"in_block": 8}}, "in_block is 8 there and 16 here"),
        ({"q": {"d_in": 128}}, "d_in is 128 there and 64 here"),
        ({"q": {"wrapper_dtype": "fp32"}}, "wrapper_dtype is fp32 there and bf16 here"),
    ],
)
def test_partners_that_do_not_fit_are_refused(lender, message):
    spec = WeightSpec(32, 64, out_block=16, in_block=16)
    others = {name: replace(spec, **changes) for name, changes in lender.items()}
    with pytest.raises(HalfplateError, match=message):
        check_shared({"k": replace(spec, in_shared="q")} | others)
    with pytest.raises(HalfplateError, match="stores no input wrapper of its own"):
        check_shared({"k": replace(spec, in_shared="k")})
    check_shared({"k": replace(spec, in_shared="q"), "q": spec})


def test_only_matrices_of_one_level_are_solved_as_one():
    spec = WeightSpec(32, 64, out_block=16, in_block=16)
    with pytest.raises(HalfplateError, match="may differ only in d_out"):
        stacked_spec([spec, replace(spec, core_dtype="int8", in_shared="q")])


def test_a_linear_finds_its_lender_by_name():
    specs = [WeightSpec(16, 32, in_block=8), WeightSpec(24, 32, in_block=8, in_shared="q")]
    weights = [torch.randn(spec.d_out, 32) for spec in specs]
    q, k = (
        CompressedLinear.from_weight(part, spec, None)
        for part, spec in zip(split(solved(weights, specs).weight, specs), specs, strict=True)
    )
    with pytest.raises(HalfplateError, match="in_shared='q': that module is not connected"):
        k(torch.randn(2, 32))
    model = nn.ModuleDict({"q": q, "k": k})
    connect(model)
    assert k.lender is q
    assert not any("lender" in name for name, _ in model.named_modules())
    assert set(k.state_dict()) == {"weight", "weight_index"}
    x = torch.randn(2, 32)
    torch.testing.assert_close(k(x), x @ k.matrix.dense().T)
    with torch.no_grad():
        q.weight_in_blocks.zero_()
    assert not k(x).any()
