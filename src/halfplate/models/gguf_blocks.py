"""Codes of a core as blocks of ggml's types: the same codes and scales in another layout, nothing is rounded.

Each type stores 32 consecutive values of a row as one fp16 scale d and 32 codes (ggml's `ggml-common.h`, types of the GGUF
specification). To add a type with scales alone: add a line to `BLOCK_TYPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfplate.formats.parts.core import NMSparse
from halfplate.formats.quantizers import Quantizer, quantizer_of, whole_numbers
from halfplate.formats.quantizers.table import NON_LINEAR
from halfplate.formats.spec import WeightSpec

WIDTH = 32  # values of a block
Bytes = NDArray[np.uint8]


def _nibbles(codes: Bytes) -> Bytes:
    """Codes (..., 32) below 16 as 16 bytes: value j in the low half of byte j, value j + 16 in its high half."""
    low, high = np.split(codes & 15, 2, axis=-1)
    packed: Bytes = np.bitwise_or(low, np.left_shift(high, 4))
    return packed


def _five_bits(codes: Bytes) -> Bytes:
    """Codes (..., 32) below 32 as 20 bytes: the fifth bits of all, value 0 first, then the rest as nibbles."""
    return np.concatenate([np.packbits(codes >> 4, axis=-1, bitorder="little"), _nibbles(codes)], axis=-1)


def _signed_bytes(codes: Bytes) -> Bytes:
    """Codes (..., 32) counted from -128 as 32 bytes in two's complement."""
    turned: Bytes = np.bitwise_xor(codes, np.uint8(128))
    return turned


@dataclass(frozen=True)
class BlockType:
    """A type whose value is d · numbers[code].

    name: ggml's name.
    numbers: the number of each code, from code 0 on.
    pack: turns codes (..., 32) into the bytes after d.
    """

    name: str
    numbers: tuple[int, ...]
    pack: Callable[[Bytes], Bytes]


# Smallest first; the first that holds all numbers of a quantizer is taken.
BLOCK_TYPES = (
    BlockType("Q4_0", tuple(range(-8, 8)), _nibbles),
    BlockType("IQ4_NL", NON_LINEAR, _nibbles),
    BlockType("Q5_0", tuple(range(-16, 16)), _five_bits),
    BlockType("Q8_0", tuple(range(-128, 128)), _signed_bytes),
)


def block_type(quantizer: Quantizer) -> BlockType | None:
    """The smallest type that holds every value of `quantizer` exactly; None if there is none."""
    numbers = whole_numbers(quantizer)
    if numbers is None:
        return None
    return next((kind for kind in BLOCK_TYPES if set(numbers) <= set(kind.numbers)), None)


def obstacle(spec: WeightSpec) -> str | None:
    """Why no type holds a matrix of `spec` exactly, as the end of a sentence about it; None if one does, also for a core in floats."""
    if len(spec.classes) > 1:
        return "have wrappers or other parts beside the core"
    if not spec.pattern.is_dense:
        return f"are {spec.pattern} sparse"
    quantizer = quantizer_of(spec.core_dtype)
    if quantizer is None:
        return None
    if spec.d_in % WIDTH:
        return f"have {spec.d_in} columns, which is not a multiple of {WIDTH}"
    return None if block_type(quantizer) else f"have core_dtype={spec.core_dtype!r}"


def encode(core: NMSparse, kind: BlockType) -> Bytes:
    """The rows of an unpruned core of codes as blocks: uint8 (d_out, d_in / 32 · bytes of a block).

    Raises KeyError if `kind` lacks a number of the quantizer.
    """
    grid = core.grid
    assert grid is not None, "floating-point values are no codes"
    rows, columns = core.shape
    least = grid.quantizer.range[0]
    theirs = {number: code for code, number in enumerate(kind.numbers)}
    numbers = whole_numbers(grid.quantizer)
    assert numbers is not None, "block_type gives no type to others"
    table = np.array([theirs[number] for number in numbers], np.uint8)
    codes = table[core.integers().numpy().astype(np.int16) - least].reshape(rows, -1, WIDTH)
    # A group of 64 or 128 columns gives each of its blocks the same scale.
    scales = grid.parameters[0].detach().numpy()[:, np.arange(columns // WIDTH) * WIDTH // grid.group]
    heads = np.ascontiguousarray(scales, "<f2")[..., None].view(np.uint8)
    return np.concatenate([heads, kind.pack(codes)], axis=-1).reshape(rows, -1)
