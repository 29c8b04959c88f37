import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats import NMSparse, WeightSpec
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.pattern import DENSE, Pattern

PATTERNS = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 5), (4, 8), (1, 8), (7, 16)])
DTYPES = st.sampled_from(["fp32", "bf16", "fp16"])


def random_sparse(
    d_out: int, groups: int, pattern: Pattern, name: str, seed: int, shared: int = 128
) -> tuple[Tensor, Tensor, NMSparse]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, groups * pattern.m, generator=generator)
    mask = torch.zeros(d_out, groups, pattern.m, dtype=torch.bool)
    for row in range(d_out):
        for group in range(groups):
            mask[row, group, torch.randperm(pattern.m, generator=generator)[: pattern.n]] = True
    mask = mask.reshape(d_out, -1)
    return weight, mask, NMSparse.from_dense(weight, mask, pattern, name, shared)


@given(PATTERNS, st.integers(1, 5), st.integers(1, 7), DTYPES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_dense_and_mask_give_back_what_was_kept(
    nm: tuple[int, int], d_out: int, groups: int, name: str, seed: int
) -> None:
    pattern, dtype = Pattern(*nm), STORED[name]
    weight, mask, sparse = random_sparse(d_out, groups, pattern, name, seed)
    assert sparse.shape == tuple(weight.shape)
    assert sparse.values.dtype == dtype
    assert torch.equal(sparse.mask(), mask)
    assert torch.equal(sparse.dense(dtype), torch.where(mask, weight, 0).to(dtype))
    assert torch.equal(sparse.dense(), torch.where(mask, weight, 0).to(dtype).float())
    assert sparse.nbytes == sparse.values.nbytes + sparse.tensors()["weight_index"].nbytes


@given(PATTERNS, st.integers(1, 5), st.integers(1, 7), DTYPES, st.sampled_from([(3,), (2, 3), (0,), ()]))
@settings(max_examples=40, deadline=None)
def test_forward_equals_the_dense_product(
    nm: tuple[int, int], d_out: int, groups: int, name: str, leading: tuple[int, ...]
) -> None:
    _, _, sparse = random_sparse(d_out, groups, Pattern(*nm), name, 0)
    x = torch.randn(*leading, sparse.shape[1], generator=torch.Generator().manual_seed(1))
    y = sparse.forward(x)
    assert y.dtype == x.dtype
    assert y.shape == (*leading, d_out)
    torch.testing.assert_close(y, x @ sparse.dense().T)


def test_kept_zeros_hold_their_place() -> None:
    pattern = Pattern(2, 4)
    weight = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    sparse = NMSparse.from_dense(weight, torch.tensor([[True, False, False, True]]), pattern, "bf16")
    assert sparse.values.tolist() == [[0.0, 5.0]]
    assert sparse.columns().tolist() == [[0, 3]]
    assert torch.equal(sparse.dense(), weight)


@pytest.mark.parametrize("nm", [(2, 4), (4, 8)])
def test_gradients_reach_the_values(nm: tuple[int, int]) -> None:
    pattern = Pattern(*nm)
    _, mask, sparse = random_sparse(3, 4, pattern, "fp32", 0)
    sparse.values.requires_grad_(True)
    x = torch.randn(5, sparse.shape[1])
    sparse.forward(x).sum().backward()
    expected = x.sum(0).expand(3, -1)[mask].reshape(3, -1)
    torch.testing.assert_close(sparse.values.grad, expected)


GRID_PATTERNS = st.sampled_from([(2, 4), (1, 4), (2, 5), (4, 8), (7, 16), (3, 12), (1, 1)])


@given(
    GRID_PATTERNS,
    st.integers(1, 4),
    st.integers(1, 300),
    st.sampled_from(sorted(name for name in QUANTIZERS if name.startswith("int") and name[-1] != "k")),
    st.integers(0, 99),
    st.sampled_from([32, 64, 128]),
)
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_are_those_of_each_row_and_group_of_columns(
    nm: tuple[int, int], d_out: int, d_in: int, name: str, seed: int, shared: int
) -> None:
    pattern = Pattern(*nm)
    groups = -(-d_in // pattern.m)
    weight, mask, sparse = random_sparse(d_out, groups, pattern, name, seed, shared)
    spec = WeightSpec(d_out, groups * pattern.m, pattern, name, group=shared)
    tensors = sparse.tensors()
    assert {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in tensors.items()} == spec.layout()
    assert torch.equal(sparse.mask(), mask)
    # By indexing alone: the value of a column is its q times the scale of its columns.
    dense, scales = torch.zeros_like(weight), tensors["weight_scales"].float()
    for row in range(d_out):
        for k, column in enumerate(sparse.columns()[row].tolist()):
            dense[row, column] = sparse.integers()[row, k] * scales[row, column // shared]
    assert torch.equal(sparse.dense(), dense)
    # No other choice of q does better.
    step = scales.repeat_interleave(shared, 1)[:, : weight.shape[1]]
    half = 2 ** (int(name.removeprefix("int")) - 1)
    lowest, highest = (-127, 127) if name == "int8" else (-half, half - 1)
    best = torch.where(step > 0, weight / step, 0).round().clamp(lowest, highest) * step
    kept = torch.where(mask, weight, 0)
    assert float((dense - kept)[mask].abs().sum()) <= float((best - kept)[mask].abs().sum()) * (1 + 1e-5)
    again = NMSparse.from_tensors(spec, tensors)
    assert torch.equal(again.dense(), dense)
    assert again.shape == sparse.shape == (spec.d_out, spec.d_in)
    assert again.nbytes == spec.nbytes


@pytest.mark.parametrize("name", ["int8", "int6", "int5", "int4", "int3", "int2", "fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_cores(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    core = NMSparse.from_dense(weight, None, DENSE, name)
    assert core.index is None
    assert core.shape == (3, 7)
    assert core.tensors()["weight"].ndim == 3
    error = (core.dense(torch.float64) - weight.double()).abs().max() / weight.double().abs().max()
    assert (
        float(error)
        <= {
            "int8": 0.01,
            "int6": 0.04,
            "int5": 0.08,
            "int4": 0.15,
            "int3": 0.25,
            "int2": 0.6,
            "fp32": 1e-7,
            "bf16": 0.004,
        }[name]
    )
    x = torch.randn(2, 7)
    torch.testing.assert_close(core.forward(x), x @ core.dense().T)


@pytest.mark.parametrize(("name", "value"), [("int8", 1e7), ("int4", 1e6), ("int4", torch.inf), ("fp16", 1e5)])
@pytest.mark.parametrize("nm", [(2, 4), (2, 5), (1, 1)])
def test_what_the_type_cannot_hold_is_refused(name: str, value: float, nm: tuple[int, int]) -> None:
    weight = torch.ones(2, 20)
    weight[1, 0] = value
    mask = (torch.arange(20) % nm[1] < nm[0]).expand(2, -1)
    with pytest.raises(HalfplateError, match=rf"core_dtype='{name}' cannot hold .* expected at most .*; use bf16"):
        NMSparse.from_dense(weight, mask, Pattern(*nm), name)
