import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.encoding.packing import check_padding, check_positions, pack, packed_nbytes, unpack
from halfplate.pattern import Pattern

PATTERNS = st.sampled_from(
    [(1, 2), (2, 3), (2, 4), (1, 4), (2, 5), (1, 8), (4, 8), (3, 16), (5, 17), (1, 64), (9, 200), (255, 256)]
)


def random_positions(d_out: int, groups: int, pattern: Pattern, seed: int) -> Tensor:
    """Rising positions (d_out, groups · N), int64."""
    scores = torch.rand(d_out, groups, pattern.m, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(-1)[:, :, : pattern.n].sort(-1).values.reshape(d_out, -1)


def naive_pack(row: list[int], width: int) -> bytes:
    """One big integer, the first position in its lowest bits."""
    number = sum(position << (width * k) for k, position in enumerate(row))
    return number.to_bytes((len(row) * width + 7) // 8, "little")


@given(PATTERNS, st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_equals_one_big_integer_a_row(nm: tuple[int, int], d_out: int, groups: int, seed: int) -> None:
    pattern = Pattern(*nm)
    positions = random_positions(d_out, groups, pattern, seed)
    index = pack(positions, pattern.index_bits)
    assert index.dtype == torch.uint8
    assert index.shape == (d_out, pattern.index_nbytes(groups * pattern.m))
    assert [bytes(row.tolist()) for row in index] == [naive_pack(row, pattern.index_bits) for row in positions.tolist()]
    assert torch.equal(unpack(index, positions.shape[1], pattern.index_bits).long(), positions)
    check_positions(index, positions.shape[1], pattern, "index")


def test_the_example_of_the_format_document() -> None:
    assert pack(torch.tensor([[0, 3, 1, 2]]), 2).tolist() == [[0x9C]]
    assert pack(torch.tensor([[5, 0, 7]]), 3).tolist() == [[0xC5, 0x01]]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_width_packs_as_one_big_integer_a_row(width: int, rows: int, count: int, seed: int) -> None:
    numbers = torch.randint(1 << width, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(numbers, width)
    assert packed.shape == (rows, packed_nbytes(count, width))
    assert [bytes(row.tolist()) for row in packed] == [naive_pack(row, width) for row in numbers.tolist()]
    assert torch.equal(unpack(packed, count, width).long(), numbers)
    check_padding(packed, count, width, "weight")
    if count * width % 8:
        packed[-1, -1] |= 128
        with pytest.raises(HalfplateError, match="weight has padding bits"):
            check_padding(packed, count, width, "weight")


def test_nibbles_are_low_first() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize(
    ("nm", "index", "kept", "complaint"),
    [
        ((2, 4), [0b0000], 2, "do not increase"),
        ((2, 4), [0b0001], 2, "do not increase"),
        ((2, 4), [0b0001_0100 | 0b1000_0000], 2, "padding bits"),
        ((1, 3), [0b11], 1, "position 3, expected below M=3"),
        ((1, 8), [0b1000], 1, "padding bits"),
        ((1, 8), [0b1100_0000, 0b10], 3, "padding bits"),
        ((2, 5), [0b0111_000], 2, "position 7"),
    ],
)
def test_indices_that_are_never_written_are_refused(
    nm: tuple[int, int], index: list[int], kept: int, complaint: str
) -> None:
    with pytest.raises(HalfplateError, match=complaint) as raised:
        check_positions(torch.tensor([index], dtype=torch.uint8), kept, Pattern(*nm), "layer.weight_index")
    assert "layer.weight_index" in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.sampled_from([(2, 4), (1, 3), (2, 5), (1, 8), (4, 8)]), st.binary(min_size=2, max_size=2), st.integers(1, 2))
@settings(max_examples=150, deadline=None)
def test_an_index_passes_exactly_if_packing_writes_it(nm: tuple[int, int], row: bytes, groups: int) -> None:
    pattern = Pattern(*nm)
    kept = groups * pattern.n
    row = row[: (kept * pattern.index_bits + 7) // 8]
    index = torch.tensor([list(row)], dtype=torch.uint8)
    number = int.from_bytes(row, "little")
    positions = [(number >> (pattern.index_bits * k)) & ((1 << pattern.index_bits) - 1) for k in range(kept)]
    rising = all(positions[k] < positions[k + 1] for k in range(kept - 1) if (k + 1) % pattern.n)
    valid = (
        rising
        and max(positions) < pattern.m
        and len(row) * 8 >= kept * pattern.index_bits
        and naive_pack(positions, pattern.index_bits) == row
    )
    if valid:
        check_positions(index, kept, pattern, "index")
    elif len(row) * 8 >= kept * pattern.index_bits:
        with pytest.raises(HalfplateError):
            check_positions(index, kept, pattern, "index")
