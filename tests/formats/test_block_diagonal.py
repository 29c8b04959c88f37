import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats import BlockDiagonal, InWrapper, OutWrapper

DTYPES = st.sampled_from(["fp32", "bf16", "fp16"])


def random_padded(size: int, block: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(-(-size // block), block, block, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 20), st.integers(1, 24), DTYPES)
@settings(max_examples=80, deadline=None)
def test_dense_is_the_blocks_along_the_diagonal(size: int, block: int, name: str) -> None:
    padded, dtype = random_padded(size, block), STORED[name]
    matrix = BlockDiagonal.from_padded(padded, size, block, name)
    expected = torch.zeros(padded.shape[0] * block, padded.shape[0] * block, dtype=dtype)
    for k, single in enumerate(padded):
        expected[k * block : (k + 1) * block, k * block : (k + 1) * block] = single.to(dtype)
    assert matrix.size == size
    assert torch.equal(matrix.dense(dtype), expected[:size, :size])
    assert (matrix.blocks is None) == (block > size)
    assert (matrix.tail is None) == (size % block == 0)
    assert matrix.nbytes == sum(part.nbytes for part in (matrix.blocks, matrix.tail) if part is not None)
    assert all(
        part.dtype == dtype and part.is_contiguous() for part in (matrix.blocks, matrix.tail) if part is not None
    )


@given(st.integers(1, 20), st.integers(1, 24), st.sampled_from([(3,), (2, 3), (0,), (2, 0), ()]))
@settings(max_examples=80, deadline=None)
def test_forward_equals_the_dense_product(size: int, block: int, leading: tuple[int, ...]) -> None:
    matrix = BlockDiagonal.from_padded(random_padded(size, block), size, block, "fp32")
    x = torch.randn(*leading, size, generator=torch.Generator().manual_seed(1))
    y = matrix.forward(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, x @ matrix.dense().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_computes_in_the_type_of_its_input(dtype: torch.dtype) -> None:
    matrix = BlockDiagonal.from_padded(random_padded(7, 3), 7, 3, "fp32")
    assert matrix.forward(torch.ones(2, 7, dtype=dtype)).dtype == dtype


def test_stored_names_leave_out_what_is_absent() -> None:
    assert InWrapper.from_padded(random_padded(8, 4), 8, 4, "fp32").tensors().keys() == {"weight_in_blocks"}
    assert OutWrapper.from_padded(random_padded(9, 4), 9, 4, "fp32").tensors().keys() == {
        "weight_out_blocks",
        "weight_out_tail",
    }
    assert OutWrapper.from_padded(random_padded(3, 4), 3, 4, "fp32").tensors().keys() == {"weight_out_tail"}


def test_gradients_reach_blocks_and_tail() -> None:
    matrix = BlockDiagonal.from_padded(random_padded(7, 3), 7, 3, "fp32")
    for part in matrix.held().values():
        part.requires_grad_(True)
    dense = matrix.dense().detach().requires_grad_(True)
    x = torch.randn(5, 7)
    matrix.forward(x).square().sum().backward()
    (x @ dense.T).square().sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(matrix.blocks.grad, torch.stack([dense.grad[:3, :3], dense.grad[3:6, 3:6]]))
    torch.testing.assert_close(matrix.tail.grad, dense.grad[6:, 6:])


@given(st.integers(1, 20), st.integers(1, 24))
@settings(max_examples=80, deadline=None)
def test_int8_rows_have_scales_and_clip_nothing(size: int, block: int) -> None:
    padded = random_padded(size, block)
    exact = BlockDiagonal.from_padded(padded, size, block, "fp32")
    matrix = BlockDiagonal.from_padded(padded, size, block, "int8")
    assert all(
        part.dtype == torch.int8 and int(part.min()) >= -127
        for part in (matrix.blocks, matrix.tail)
        if part is not None
    )
    assert matrix.scales is not None
    assert (matrix.scales.dtype, matrix.scales.shape) == (torch.float16, (size,))
    assert matrix.nbytes == sum(part.nbytes for part in (matrix.blocks, matrix.tail) if part is not None) + 2 * size
    integers = BlockDiagonal(matrix.blocks, matrix.tail).dense(torch.float64)
    dense = integers * matrix.scales.double()[:, None]  # a factor of each row
    assert torch.equal(matrix.dense(torch.float64), dense)
    assert bool(((exact.dense(torch.float64) - dense).abs() <= matrix.scales.double()[:, None] * 0.5001).all())
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(matrix.forward(x), x @ dense.T)
    torch.testing.assert_close(matrix.transposed(torch.float64).dense(torch.float64), dense.T)


@pytest.mark.parametrize(("name", "value"), [("int8", 1e7), ("fp16", 1e5), ("fp32", torch.inf), ("int8", torch.nan)])
def test_what_the_type_cannot_hold_is_refused(name: str, value: float) -> None:
    padded = random_padded(8, 4)
    padded[1, 2, 3] = value
    with pytest.raises(HalfplateError, match=f"wrapper_dtype='{name}' cannot hold"):
        BlockDiagonal.from_padded(padded, 8, 4, name)
