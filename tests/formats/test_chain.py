import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.dtypes import WRAPPER_DTYPES
from halfplate.formats import BlockDiagonal, Chain, InWrapper, NMSparse, OutWrapper, Permutation, WeightSpec
from halfplate.formats.quantizers import core_dtypes
from halfplate.pattern import Pattern


@st.composite
def specs(draw: st.DrawFn) -> WeightSpec:
    pattern = Pattern(*draw(st.sampled_from([(1, 2), (2, 4), (2, 5), (4, 8), (1, 1)])))
    return WeightSpec(
        d_out=draw(st.integers(1, 20)),
        d_in=pattern.m * draw(st.integers(1, 40)),
        pattern=pattern,
        core_dtype=draw(st.sampled_from(core_dtypes())),
        out_block=draw(st.integers(0, 24)),
        in_block=draw(st.sampled_from([0, 1, pattern.m, 2 * pattern.m, 8 * pattern.m])),
        wrapper_dtype=draw(st.sampled_from(WRAPPER_DTYPES)),
        permuted=draw(st.booleans()),
        group=draw(st.sampled_from([32, 64, 128])),
    )


def random_chain(spec: WeightSpec, seed: int = 0) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.d_out, spec.d_in, generator=generator)
    groups = weight.abs().reshape(spec.d_out, -1, spec.pattern.m)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(spec.pattern.n).indices, True)
    core = NMSparse.from_dense(weight, mask.reshape(weight.shape), spec.pattern, spec.core_dtype, spec.group)
    wrappers = [
        kind.from_padded(
            torch.randn(-(-size // block), block, block, generator=generator), size, block, spec.wrapper_dtype
        )
        if block
        else None
        for kind, size, block in ((OutWrapper, spec.d_out, spec.out_block), (InWrapper, spec.d_in, spec.in_block))
    ]
    order = Permutation.of(torch.randperm(spec.d_in, generator=generator)) if spec.permuted else None
    return Chain.from_tensors(spec, Chain.of(spec, core, *wrappers, order).tensors())


def whole(wrapper: BlockDiagonal | None, size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64) if wrapper is None else wrapper.dense(torch.float64)


@given(specs())
@settings(max_examples=80, deadline=None)
def test_dense_is_the_product_of_its_parts(spec: WeightSpec) -> None:
    chain = random_chain(spec)
    expected = (
        whole(chain.part(OutWrapper), spec.d_out)
        @ chain.core.dense(torch.float64)
        @ whole(chain.part(InWrapper), spec.d_in)
    )
    if (permutation := chain.part(Permutation)) is not None:
        moves = torch.zeros(spec.d_in, spec.d_in, dtype=torch.float64)  # Pᵀ: its row j picks the input of column j
        for column, of_input in enumerate(permutation.order.tolist()):
            moves[column, of_input] = 1
        expected = expected @ moves
    assert chain.shape == (spec.d_out, spec.d_in)
    assert chain.dense().dtype == torch.float32
    assert chain.dense().is_contiguous()
    torch.testing.assert_close(chain.dense(torch.float64), expected)


@given(specs(), st.sampled_from([(3,), (2, 3), (0,), (2, 0)]))
@settings(max_examples=80, deadline=None)
def test_forward_equals_the_dense_product(spec: WeightSpec, leading: tuple[int, ...]) -> None:
    chain = random_chain(spec)
    x = torch.randn(*leading, spec.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(chain.forward(x), x @ chain.dense(torch.float64).T)


@given(specs())
@settings(max_examples=80, deadline=None)
def test_stored_tensors_are_those_of_the_spec(spec: WeightSpec) -> None:
    chain = random_chain(spec)
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in chain.tensors().items()}
    assert stored == spec.layout()
    assert chain.nbytes == spec.nbytes


def test_gradients_reach_every_part() -> None:
    spec = WeightSpec(11, 12, out_block=4, in_block=8, core_dtype="fp32", wrapper_dtype="fp32")
    chain = random_chain(spec)
    parts = [tensor.requires_grad_(True) for tensor in chain.tensors().values() if tensor.is_floating_point()]
    assert len(parts) == 5
    x = torch.randn(6, 12)
    by_forward = torch.autograd.grad(chain.forward(x).square().sum(), parts)
    by_dense = torch.autograd.grad((x @ chain.dense().T).square().sum(), parts)
    for one, other in zip(by_forward, by_dense, strict=True):
        assert bool(one.abs().sum() > 0)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
