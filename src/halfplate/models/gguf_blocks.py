"""Codes of a core as blocks of ggml's types: the same codes and scales in another layout, nothing is rounded.

A block is 32 consecutive values of a row with fp16 parameters, or 256 with small integers under fp16 super-scales
(`gguf_super_blocks`). Source: ggml's `ggml-common.h`, types of the GGUF specification. To add a type: add a line to `BLOCK_TYPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from halfplate.formats.parts.core import Grid, NMSparse
from halfplate.formats.quantizers import quantizer_of, whole_numbers
from halfplate.formats.quantizers.affine import Affine
from halfplate.formats.quantizers.table import NON_LINEAR
from halfplate.formats.spec import WeightSpec
from halfplate.models.gguf_super_blocks import (
    WIDTH as SUPER_WIDTH,
)
from halfplate.models.gguf_super_blocks import (
    Bytes,
    SuperBlocks,
    code_numbers,
    iq4_xs,
    nibbles,
    q2_k,
    q3_k,
    q4_k,
    q5_k,
    q6_k,
)

WIDTH = 32  # values of a block


class BlockType(Protocol):
    """A type of ggml. name: ggml's; bits: per weight."""

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> float: ...

    def holds(self, spec: WeightSpec) -> bool:
        """Whether it holds every unpruned core of `spec`, which has codes and no other parts, exactly."""

    def encode(self, core: NMSparse) -> Bytes:
        """The rows of a core that it holds: uint8 (d_out, bytes of a row)."""


def _five_bits(codes: Bytes) -> Bytes:
    """Codes (..., 32) below 32 as 20 bytes: the fifth bits of all, value 0 first, then the rest as nibbles."""
    return np.concatenate([np.packbits(codes >> 4, axis=-1, bitorder="little"), nibbles(codes)], axis=-1)


def _signed_bytes(codes: Bytes) -> Bytes:
    """Codes (..., 32) counted from -128 as 32 bytes in two's complement."""
    turned: Bytes = np.bitwise_xor(codes, np.uint8(128))
    return turned


@dataclass(frozen=True)
class ScaleBlocks:
    """Types whose value is d · numbers[code].

    numbers: the number of each code, from code 0 on.
    pack: turns codes (..., 32) into the bytes after d.
    """

    name: str
    bits: float
    numbers: tuple[int, ...]
    pack: Callable[[Bytes], Bytes]

    def holds(self, spec: WeightSpec) -> bool:
        """As in `BlockType`."""
        quantizer = quantizer_of(spec.core_dtype)
        numbers = None if quantizer is None else whole_numbers(quantizer)
        return _divides(spec) and numbers is not None and set(numbers) <= set(self.numbers)

    def encode(self, core: NMSparse) -> Bytes:
        """As in `BlockType`."""
        grid = _grid(core)
        theirs = {number: code for code, number in enumerate(self.numbers)}
        codes = code_numbers(core, np.array([theirs[number] for number in whole_numbers(grid.quantizer) or ()]))
        return _joined(_heads(grid, 0, core.shape[1]), self.pack(codes.reshape(len(codes), -1, WIDTH)))


@dataclass(frozen=True)
class MinimumBlocks:
    """Types whose value is d · code + m. longest: bits of a code."""

    name: str
    bits: float
    longest: int
    pack: Callable[[Bytes], Bytes]

    def holds(self, spec: WeightSpec) -> bool:
        """As in `BlockType`."""
        quantizer = quantizer_of(spec.core_dtype)
        return _divides(spec) and isinstance(quantizer, Affine) and quantizer.bits <= self.longest

    def encode(self, core: NMSparse) -> Bytes:
        """As in `BlockType`."""
        grid = _grid(core)
        codes = code_numbers(core).reshape(core.shape[0], -1, WIDTH)
        return _joined(_heads(grid, 0, core.shape[1]), _heads(grid, 1, core.shape[1]), self.pack(codes))


# Smallest first; the first that holds all values of a quantizer is taken.
BLOCK_TYPES: tuple[BlockType, ...] = (
    SuperBlocks("Q2_K", 2.625, None, 2, 16, 4, q2_k),
    SuperBlocks("Q3_K", 3.4375, tuple(range(-4, 4)), 3, 16, 5, q3_k),
    SuperBlocks("IQ4_XS", 4.25, NON_LINEAR, 4, 32, 5, iq4_xs),
    ScaleBlocks("Q4_0", 4.5, tuple(range(-8, 8)), nibbles),
    ScaleBlocks("IQ4_NL", 4.5, NON_LINEAR, nibbles),
    SuperBlocks("Q4_K", 4.5, None, 4, 32, 6, q4_k),
    MinimumBlocks("Q4_1", 5.0, 4, nibbles),
    ScaleBlocks("Q5_0", 5.5, tuple(range(-16, 16)), _five_bits),
    SuperBlocks("Q5_K", 5.5, None, 5, 32, 6, q5_k),
    MinimumBlocks("Q5_1", 6.0, 5, _five_bits),
    SuperBlocks("Q6_K", 6.5625, tuple(range(-32, 32)), 6, 16, 7, q6_k),
    ScaleBlocks("Q8_0", 8.5, tuple(range(-128, 128)), _signed_bytes),
)


def block_type(spec: WeightSpec) -> BlockType | None:
    """The smallest type that holds every matrix of `spec` exactly; None if there is none."""
    return common_type([spec])


def common_type(specs: Collection[WeightSpec]) -> BlockType | None:
    """The smallest type that holds the matrices of all `specs` exactly; None if there is none."""
    if not specs or any(len(spec.classes) > 1 or not spec.pattern.is_dense for spec in specs):
        return None
    return next((kind for kind in BLOCK_TYPES if all(map(kind.holds, specs))), None)


def obstacle(spec: WeightSpec) -> str | None:
    """Why no type holds a matrix of `spec` exactly, as the end of a sentence about it; None if one does, also for a core in floats."""
    if len(spec.classes) > 1:
        return "have wrappers or other parts beside the core"
    if not spec.pattern.is_dense:
        return f"are {spec.pattern} sparse"
    if quantizer_of(spec.core_dtype) is None or block_type(spec) is not None:
        return None
    if spec.d_in % WIDTH:
        return f"have {spec.d_in} columns, which is not a multiple of {WIDTH}"
    if spec.group % WIDTH:
        return f"have core_dtype={spec.core_dtype!r} in groups of {spec.group} and {spec.d_in} columns, which K types want as multiples of {SUPER_WIDTH}"
    return f"have core_dtype={spec.core_dtype!r}"


def _divides(spec: WeightSpec) -> bool:
    """Whether blocks of 32 values have one parameter each."""
    return spec.d_in % WIDTH == 0 and spec.group % WIDTH == 0


def _grid(core: NMSparse) -> Grid:
    assert core.grid is not None, "floating-point values are no codes"
    return core.grid


def _heads(grid: Grid, place: int, columns: int) -> Bytes:
    """The fp16 parameter `place` of each block: uint8 (rows, blocks, 2). Groups of 64 or 128 columns give their blocks the same one."""
    parameters = grid.parameters[place].detach().numpy()[:, np.arange(columns // WIDTH) * WIDTH // grid.group]
    return np.ascontiguousarray(parameters, "<f2")[..., None].view(np.uint8)


def _joined(*parts: Bytes) -> Bytes:
    """Parts of blocks (rows, blocks, bytes) as rows of bytes."""
    return np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)


__all__ = ["BLOCK_TYPES", "BlockType", "block_type", "common_type", "obstacle"]
