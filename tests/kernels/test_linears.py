"""The operator over the matrices of a fused group, whole and in shards of several ranks."""

import pytest
import torch
from stored_linears import random_linear

from halfplate.formats import Chain, WeightSpec
from halfplate.formats.sharding import shard, shard_of
from halfplate.kernels import native
from halfplate.kernels.linear import multiply, pack
from halfplate.kernels.operators import linears
from halfplate.pattern import DENSE

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

GROUP = (
    WeightSpec(64, 128, core_dtype="bf16"),
    WeightSpec(32, 128, core_dtype="int4", out_block=16, in_block=16, wrapper_dtype="int8", group=32),
    WeightSpec(32, 128, DENSE, "nl4", group=64),
)


def near(found, expected, share=1e-5):
    assert (found.float() - expected.float()).abs().max() <= share * expected.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 20, 130])
@pytest.mark.parametrize("activations", ["float", "auto"])
def test_products_stand_side_by_side_before_zeros(dtype, tokens, activations):
    packed = [pack(spec, random_linear(spec, seed), activations) for seed, spec in enumerate(GROUP)]
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = linears(x, packed, [spec.d_out for spec in GROUP], 140)
    assert found.dtype == dtype
    assert found.shape == (tokens, 140)
    assert not found[:, 128:].any()
    for matrix, spec, mine in zip(packed, GROUP, found[:, :128].split([64, 32, 32], 1), strict=True):
        expected = multiply(x, matrix, spec.d_out)
        assert torch.equal(mine, expected) or tokens > 100


def test_tracing_sees_one_call():
    packed = [pack(spec, random_linear(spec)) for spec in GROUP]
    torch.library.opcheck(torch.ops.halfplate.linears, (torch.randn(2, 128), packed, [64, 32, 32], 128))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("spec", GROUP, ids=lambda spec: spec.core_dtype)
def test_the_kernels_products_of_all_ranks_are_the_whole_product(spec, axis):
    tensors = random_linear(spec)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(4))
    parts = []
    for rank in range(2):
        start, size = shard_of(spec, axis, rank, 2, "q_proj")
        part: Chain = shard(spec, tensors, axis, start, size)
        mine = x if axis == "rows" else x[:, start : start + size]
        parts.append(linears(mine, [pack(part.spec, part.tensors())], [part.spec.d_out], part.spec.d_out))
    found = torch.cat(parts, 1) if axis == "rows" else parts[0] + parts[1]
    near(found, multiply(x, pack(spec, tensors), spec.d_out))
