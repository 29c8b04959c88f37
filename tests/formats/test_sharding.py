"""Shards of a matrix: the products of all ranks, concatenated or summed, are the product of the whole matrix."""

from dataclasses import replace

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.formats import BlockDiagonal, Chain, InWrapper, LowRank, NMSparse, OutWrapper, WeightSpec
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.sharding import check_shards, shard, shard_of
from halfplate.pattern import DENSE, Pattern

TWO_OF_FOUR = Pattern(2, 4)


def matrix_of(spec, seed=0):
    """A random matrix of `spec`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.d_out, spec.d_in, generator=generator)
    mask = None
    if not spec.pattern.is_dense:
        groups = torch.rand(spec.d_out, spec.d_in // spec.pattern.m, spec.pattern.m, generator=generator)
        mask = (groups.argsort(-1).argsort(-1) < spec.pattern.n).reshape(spec.d_out, spec.d_in)
    core = core_of(weight, mask, spec)
    outer = []
    for kind, size, block in ((OutWrapper, spec.d_out, spec.out_block), (InWrapper, spec.d_in, spec.in_block)):
        if block:
            blocks = torch.randn(-(-size // block), block, block, generator=generator)
            outer.append(kind.from_padded(blocks, size, block, spec.wrapper_dtype))
    if spec.rank:
        left, right = (
            torch.randn(*shape, generator=generator) for shape in ((spec.d_out, spec.rank), (spec.rank, spec.d_in))
        )
        outer.append(LowRank.rounded(left, right, spec.wrapper_dtype))
    return Chain.of(spec, core, *outer)


def core_of(weight, mask, spec):
    quantizer = QUANTIZERS.get(spec.core_dtype) if spec.core_dtype in QUANTIZERS else None
    if quantizer is None or not spec.core_dtype.endswith(("k", "s")):
        return NMSparse.from_dense(weight, mask, spec.pattern, spec.core_dtype, spec.group)
    # Scales under super-scales cannot be chosen freely: small multiples of 2^-8 are storable.
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(*quantizer.range, weight.shape, generator=generator, dtype=torch.int8)
    scales = torch.randint(1, 30, (spec.d_out, -(-spec.d_in // spec.group)), generator=generator) / 256
    return NMSparse.from_codes(codes, scales.half(), mask, spec.pattern, spec.core_dtype, spec.group)


SPECS = [
    WeightSpec(64, 128, TWO_OF_FOUR, "bf16"),
    WeightSpec(64, 256, TWO_OF_FOUR, "int4", group=64),
    WeightSpec(64, 256, TWO_OF_FOUR, "int3", 32, 16, "int8", group=32),
    WeightSpec(64, 256, DENSE, "int8", 0, 64, "bf16"),
    WeightSpec(64, 256, DENSE, "nl4", 16, 0, "fp32", group=32),
    WeightSpec(64, 1024, DENSE, "int3k", group=64),
    WeightSpec(64, 512, DENSE, "int6k", 1, 1, "int8", group=32),
    WeightSpec(64, 128, Pattern(3, 8), "fp16", 16, 8, "bf16", rank=3),
]


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.pattern} {spec.core_dtype} {spec.out_block}x{spec.in_block}"
)
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_products_of_all_ranks_are_the_whole_product(spec, axis, shared):
    if shared and not spec.in_block:
        pytest.skip("has no wrapper to share")
    matrix = matrix_of(spec)
    named = replace(spec, in_shared="lender") if shared else spec
    x = torch.randn(5, spec.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, products = x @ matrix.dense(torch.float64).T, []
    for rank in range(2):
        start, size = shard_of(named, axis, rank, 2, "q_proj")
        part = shard(named, matrix.tensors(), axis, start, size)
        assert {name: (tuple(t.shape), t.dtype) for name, t in part.tensors().items()} == part.spec.layout()
        mine = x if axis == "rows" else x[:, start : start + size]
        products.append(mine @ part.dense(torch.float64).T)
    found = torch.cat(products, 1) if axis == "rows" else sum(products)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-10)


def test_one_rank_keeps_any_matrix_whole():
    spec = WeightSpec(40, 36, TWO_OF_FOUR, "int4", 16, 16, "int8")  # tails on both sides
    matrix = matrix_of(spec)
    for axis in ("rows", "columns"):
        start, size = shard_of(spec, axis, 0, 1, "q")
        part = shard(spec, matrix.tensors(), axis, start, size)
        assert torch.equal(part.dense(), matrix.dense())


def test_the_last_shard_may_end_in_a_smaller_block():
    blocks = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = BlockDiagonal.from_padded(blocks, 20, 8, "fp32")
    assert torch.equal(whole.cut(8, 12, 8).dense(), whole.dense()[8:, 8:])


@pytest.mark.parametrize(
    ("spec", "axis", "size", "cure"),
    [
        (WeightSpec(96, 128, out_block=32), "rows", 48, "--block-size 24"),
        (WeightSpec(128, 96, DENSE, in_block=32), "columns", 48, "--block-size 24"),
        (WeightSpec(128, 256, DENSE, "int4"), "columns", 64, "--group-size 64"),
        (WeightSpec(128, 512, DENSE, "int3k", group=64), "columns", 256, "--group-size 32"),
        (WeightSpec(128, 192, DENSE, "int4", 0, 64), "columns", 96, "--block-size 48 --group-size 32"),
        (WeightSpec(128, 128, DENSE, "int6k", group=32), "columns", 64, "--core-dtype int6,"),
        (WeightSpec(128, 128, permuted=True), "columns", 64, "use tensor_parallel_size=1"),
    ],
)
def test_a_cut_through_a_part_is_refused_with_a_size_that_would_do(spec, axis, size, cure):
    with pytest.raises(HalfplateError, match=rf"layers\.0\.q_proj.*{cure}"):
        check_shards(spec, axis, size, "layers.0.q_proj")


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(HalfplateError, match="96 rows, expected a multiple of tensor_parallel_size=5"):
        shard_of(WeightSpec(96, 128), "rows", 0, 5, "q")
    with pytest.raises(HalfplateError, match="rank=2 must be 0 to 1"):
        shard_of(WeightSpec(96, 128), "rows", 2, 2, "q")
