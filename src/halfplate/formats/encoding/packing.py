"""Small integers (positions of kept values, codes) as one little-endian bit stream per row (docs/format.md)."""

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern


def packed_nbytes(count: int, width: int) -> int:
    """Bytes of a row of `count` numbers of `width` bits; each row starts on a byte."""
    return (count * width + 7) // 8


def pack(numbers: Tensor, width: int) -> Tensor:
    """Pack numbers into `width` bits each, least significant bit first.

    numbers: (rows, count) integers in [0, 2^width), width at most 8. Returns uint8 (rows, ceil(count · width / 8));
    padding bits are 0.
    """
    rows, count = numbers.shape
    numbers = numbers.to(torch.uint8)
    if 8 % width:
        shifts = torch.arange(width, dtype=torch.uint8, device=numbers.device)
        numbers, width = (numbers[:, :, None] >> shifts & 1).reshape(rows, count * width), 1
    numbers = functional.pad(numbers, (0, -numbers.shape[1] % (8 // width)))
    return _join(numbers.reshape(rows, -1, 8 // width), width)


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """Undo `pack`: returns uint8 (rows, count)."""
    rows = packed.shape[0]
    if 8 % width == 0:
        return _split(packed, width)[:, :count]
    bits = _split(packed, 1)[:, : count * width]
    return _join(bits.reshape(rows, count, width), 1)


def _split(packed: Tensor, width: int) -> Tensor:
    """The numbers of `width` bits, a divisor of 8, in each byte: uint8 (rows, bytes) to (rows, bytes · 8 / width)."""
    if width == 8:
        return packed
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return (packed[:, :, None] >> shifts & ((1 << width) - 1)).reshape(packed.shape[0], -1)


def _join(numbers: Tensor, width: int) -> Tensor:
    """Bytes from numbers of `width` bits, lowest first: uint8 (..., at most 8 / width) to uint8 (...)."""
    shifts = width * torch.arange(numbers.shape[-1], dtype=torch.uint8, device=numbers.device)
    return (numbers << shifts).sum(-1, dtype=torch.uint8)


def check_padding(packed: Tensor, count: int, width: int, name: str) -> None:
    """Raise HalfplateError, naming the tensor `name`, unless the bits after the last number of each row are 0."""
    used = count * width % 8  # used bits of the last byte of each row; 0 if all are used
    if used and bool((packed[:, -1] >> used).any()):
        raise HalfplateError(f"{name} has padding bits that are not 0; the file is damaged, write it again")


def check_positions(index: Tensor, kept: int, pattern: Pattern, name: str) -> None:
    """Raise HalfplateError, naming the tensor `name`, unless `index` holds valid packed positions.

    Positions must be below M and increase strictly within a group, and padding bits must be 0. kept: positions per row.
    """
    positions = unpack(index, kept, pattern.index_bits)
    if int(positions.max()) >= pattern.m:
        raise HalfplateError(
            f"{name} holds the position {int(positions.max())}, expected below M={pattern.m}; the file is damaged, write it again"
        )
    groups = positions.reshape(positions.shape[0], -1, pattern.n)
    if bool((groups[:, :, 1:] <= groups[:, :, :-1]).any()):
        raise HalfplateError(
            f"{name} holds positions that do not increase within a group of {pattern}; the file is damaged, write it again"
        )
    check_padding(index, kept, pattern.index_bits, name)
