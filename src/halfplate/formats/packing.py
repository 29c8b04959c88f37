"""Positions of kept values as a little-endian bit stream (docs/format.md)."""

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern


def pack_positions(positions: Tensor, pattern: Pattern) -> Tensor:
    """Pack positions inside their groups into `index_bits` bits each, least significant bit first.

    positions: (d_out, kept) integers in [0, M). Returns uint8 (d_out, ceil(kept · index_bits / 8)); padding bits are 0.
    """
    d_out, kept = positions.shape
    width = pattern.index_bits
    shifts = torch.arange(width, dtype=torch.uint8, device=positions.device)
    bits = (positions.to(torch.uint8)[:, :, None] >> shifts) & 1  # (d_out, kept, width)
    bits = bits.reshape(d_out, kept * width)
    bits = torch.nn.functional.pad(bits, (0, -kept * width % 8)).reshape(d_out, -1, 8)
    return _join(bits)


def unpack_positions(index: Tensor, kept: int, pattern: Pattern) -> Tensor:
    """Undo `pack_positions`: uint8 (d_out, kept)."""
    width = pattern.index_bits
    if 8 % width == 0:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=index.device)
        fields = (index[:, :, None] >> shifts) & ((1 << width) - 1)  # (d_out, bytes, positions a byte)
        return fields.reshape(index.shape[0], -1)[:, :kept]
    bits = (index[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=index.device)) & 1
    return _join(bits.reshape(index.shape[0], -1)[:, : kept * width].reshape(index.shape[0], kept, width))


def _join(bits: Tensor) -> Tensor:
    """Numbers from their bits, least significant first: uint8 (..., at most 8) to uint8 (...)."""
    weighted = bits << torch.arange(bits.shape[-1], dtype=torch.uint8, device=bits.device)
    return weighted.sum(-1, dtype=torch.uint8)


def check_positions(index: Tensor, kept: int, pattern: Pattern, name: str) -> None:
    """Raise HalfplateError, naming the tensor `name`, unless `index` is what `pack_positions` writes.

    Positions must be below M and rise strictly within a group, and padding bits must be 0.
    """
    positions = unpack_positions(index, kept, pattern)
    if int(positions.max()) >= pattern.m:
        raise HalfplateError(
            f"{name} holds the position {int(positions.max())}, expected below M={pattern.m}; the file is damaged, write it again"
        )
    groups = positions.reshape(positions.shape[0], -1, pattern.n)
    if bool((groups[:, :, 1:] <= groups[:, :, :-1]).any()):
        raise HalfplateError(
            f"{name} holds positions that do not rise within a group of {pattern}; the file is damaged, write it again"
        )
    used = kept * pattern.index_bits % 8  # bits of the last byte of each row; 0 where they fill it
    if used and bool((index[:, -1] >> used).any()):
        raise HalfplateError(f"{name} has padding bits that are not 0; the file is damaged, write it again")
