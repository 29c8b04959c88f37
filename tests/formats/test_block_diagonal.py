import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.formats import BlockDiagonal

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_padded(size: int, block: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(-(-size // block), block, block, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 20), st.integers(1, 24), DTYPES)
@settings(max_examples=80, deadline=None)
def test_dense_is_the_blocks_along_the_diagonal(size: int, block: int, dtype: torch.dtype) -> None:
    padded = random_padded(size, block)
    matrix = BlockDiagonal.from_padded(padded, size, block, dtype)
    expected = torch.zeros(padded.shape[0] * block, padded.shape[0] * block, dtype=dtype)
    for k, single in enumerate(padded):
        expected[k * block : (k + 1) * block, k * block : (k + 1) * block] = single.to(dtype)
    assert matrix.size == size
    assert torch.equal(matrix.dense(dtype), expected[:size, :size])
    assert (matrix.blocks is None) == (block > size)
    assert (matrix.tail is None) == (size % block == 0)
    assert matrix.nbytes == sum(part.nbytes for part in matrix.parts)
    assert all(part.dtype == dtype and part.is_contiguous() for part in matrix.parts)


@given(st.integers(1, 20), st.integers(1, 24), st.sampled_from([(3,), (2, 3), (0,), (2, 0), ()]))
@settings(max_examples=80, deadline=None)
def test_forward_equals_the_dense_product(size: int, block: int, leading: tuple[int, ...]) -> None:
    matrix = BlockDiagonal.from_padded(random_padded(size, block), size, block, torch.float32)
    x = torch.randn(*leading, size, generator=torch.Generator().manual_seed(1))
    y = matrix.forward(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, x @ matrix.dense().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_computes_in_the_type_of_its_input(dtype: torch.dtype) -> None:
    matrix = BlockDiagonal.from_padded(random_padded(7, 3), 7, 3, torch.float32)
    assert matrix.forward(torch.ones(2, 7, dtype=dtype)).dtype == dtype


def test_stored_names_leave_out_what_is_absent() -> None:
    assert BlockDiagonal.from_padded(random_padded(8, 4), 8, 4, torch.float32).tensors("in").keys() == {
        "weight_in_blocks"
    }
    assert BlockDiagonal.from_padded(random_padded(9, 4), 9, 4, torch.float32).tensors("out").keys() == {
        "weight_out_blocks",
        "weight_out_tail",
    }
    assert BlockDiagonal.from_padded(random_padded(3, 4), 3, 4, torch.float32).tensors("out").keys() == {
        "weight_out_tail"
    }


def test_gradients_reach_blocks_and_tail() -> None:
    matrix = BlockDiagonal.from_padded(random_padded(7, 3), 7, 3, torch.float32)
    for part in matrix.parts:
        part.requires_grad_(True)
    dense = matrix.dense().detach().requires_grad_(True)
    x = torch.randn(5, 7)
    matrix.forward(x).square().sum().backward()
    (x @ dense.T).square().sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(matrix.blocks.grad, torch.stack([dense.grad[:3, :3], dense.grad[3:6, 3:6]]))
    torch.testing.assert_close(matrix.tail.grad, dense.grad[6:, 6:])
