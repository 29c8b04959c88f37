import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.formats import NMSparse
from halfplate.pattern import Pattern

PATTERNS = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 5), (4, 8), (1, 8), (7, 16)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_sparse(
    d_out: int, groups: int, pattern: Pattern, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, NMSparse]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, groups * pattern.m, generator=generator)
    mask = torch.zeros(d_out, groups, pattern.m, dtype=torch.bool)
    for row in range(d_out):
        for group in range(groups):
            mask[row, group, torch.randperm(pattern.m, generator=generator)[: pattern.n]] = True
    mask = mask.reshape(d_out, -1)
    return weight, mask, NMSparse.from_dense(weight, mask, pattern, dtype)


@given(PATTERNS, st.integers(1, 5), st.integers(1, 7), DTYPES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_dense_and_mask_give_back_what_was_kept(
    nm: tuple[int, int], d_out: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    pattern = Pattern(*nm)
    weight, mask, sparse = random_sparse(d_out, groups, pattern, dtype, seed)
    assert sparse.shape == tuple(weight.shape)
    assert sparse.values.dtype == dtype
    assert torch.equal(sparse.mask(), mask)
    assert torch.equal(sparse.dense(dtype), torch.where(mask, weight, 0).to(dtype))
    assert torch.equal(sparse.dense(), torch.where(mask, weight, 0).to(dtype).float())
    assert sparse.nbytes == sparse.values.nbytes + sparse.index.nbytes


@given(PATTERNS, st.integers(1, 5), st.integers(1, 7), DTYPES, st.sampled_from([(3,), (2, 3), (0,), ()]))
@settings(max_examples=40, deadline=None)
def test_forward_equals_the_dense_product(
    nm: tuple[int, int], d_out: int, groups: int, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    _, _, sparse = random_sparse(d_out, groups, Pattern(*nm), dtype, 0)
    x = torch.randn(*leading, sparse.shape[1], generator=torch.Generator().manual_seed(1))
    y = sparse.forward(x)
    assert y.dtype == x.dtype
    assert y.shape == (*leading, d_out)
    torch.testing.assert_close(y, x @ sparse.dense().T)


def test_kept_zeros_hold_their_place() -> None:
    pattern = Pattern(2, 4)
    weight = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    sparse = NMSparse.from_dense(weight, torch.tensor([[True, False, False, True]]), pattern, torch.bfloat16)
    assert sparse.values.tolist() == [[0.0, 5.0]]
    assert sparse.columns().tolist() == [[0, 3]]
    assert torch.equal(sparse.dense(), weight)


@pytest.mark.parametrize("nm", [(2, 4), (4, 8)])
def test_gradients_reach_the_values(nm: tuple[int, int]) -> None:
    pattern = Pattern(*nm)
    _, mask, sparse = random_sparse(3, 4, pattern, torch.float32, 0)
    sparse.values.requires_grad_(True)
    x = torch.randn(5, sparse.shape[1])
    sparse.forward(x).sum().backward()
    expected = x.sum(0).expand(3, -1)[mask].reshape(3, -1)
    torch.testing.assert_close(sparse.values.grad, expected)
