"""ggml's K types: blocks of 256 values, with small integers under fp16 super-scales as the scales and minima of their groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfplate.formats.encoding.packing import unpack
from halfplate.formats.parts.core import NMSparse
from halfplate.formats.quantizers import quantizer_of, storage_of, whole_numbers
from halfplate.formats.quantizers.affine import Affine
from halfplate.formats.quantizers.storage import SuperScales
from halfplate.formats.spec import WeightSpec

WIDTH = 256  # values of a block
Bytes = NDArray[np.uint8]


def code_numbers(core: NMSparse, table: NDArray[Any] | None = None) -> Bytes:
    """The codes of a core from 0 on, or what `table` holds for each: uint8 (d_out, d_in)."""
    assert core.grid is not None, "floating-point values are no codes"
    codes = core.integers().numpy().astype(np.int16) - core.grid.quantizer.range[0]
    numbers: Bytes = (codes if table is None else table[codes]).astype(np.uint8)
    return numbers


def nibbles(codes: Bytes) -> Bytes:
    """Codes (..., n) below 16 as n / 2 bytes: value j in the low half of byte j, value j + n / 2 in its high half."""
    low, high = np.split(codes & 15, 2, axis=-1)
    packed: Bytes = np.bitwise_or(low, np.left_shift(high, 4))
    return packed


def _above(numbers: Bytes, bits: int) -> Bytes:
    """The numbers without their lowest bits."""
    shifted: Bytes = np.right_shift(numbers, np.uint8(bits))
    return shifted


def _below(numbers: Bytes, bits: int) -> Bytes:
    """The lowest bits of the numbers."""
    masked: Bytes = np.bitwise_and(numbers, np.uint8((1 << bits) - 1))
    return masked


def bits_of_codes(codes: Bytes, bits: int, stride: int) -> Bytes:
    """Codes (rows, blocks, n) of `bits` bits, packed in runs of `stride` bytes: value j of run r in the lowest bits of byte j of the run."""
    runs = codes.reshape(*codes.shape[:2], -1, 8 // bits, stride)
    places = (np.arange(8 // bits, dtype=np.uint8) * bits)[:, None]
    packed: Bytes = np.bitwise_or.reduce(np.left_shift(runs, places), axis=-2)
    return packed.reshape(*codes.shape[:2], -1)


@dataclass(frozen=True)
class Block:
    """The contents of blocks. codes: uint8 (rows, blocks, 256).

    scales, minima: integers, uint8 (rows, blocks, groups). d, dmin: their super-scales, fp16 as bytes (rows, blocks, 2). Without
    minima, both are None.
    """

    codes: Bytes
    scales: Bytes
    d: Bytes
    minima: Bytes | None = None
    dmin: Bytes | None = None


@dataclass(frozen=True)
class SuperBlocks:
    """A K type, whose value is d · scale · number, or d · scale · code − dmin · minimum.

    bits: per weight.
    numbers: the number of each code; None for a type with minima.
    longest: bits of a code.
    group: values that share a scale.
    most: bits of a scale that are used; ggml's signed scales have one more.
    pack: turns contents into the bytes of blocks (rows, blocks, bytes).
    """

    name: str
    bits: float
    numbers: tuple[int, ...] | None
    longest: int
    group: int
    most: int
    pack: Callable[[Block], Bytes]

    def holds(self, spec: WeightSpec) -> bool:
        """As in `BlockType`."""
        quantizer = quantizer_of(spec.core_dtype)
        if quantizer is None or spec.d_in % WIDTH or spec.group % self.group:
            return False
        storage = storage_of(quantizer, spec.group)
        if not isinstance(storage, SuperScales) or storage.bits > self.most or storage.span * spec.group % WIDTH:
            return False
        if self.numbers is None:
            return isinstance(quantizer, Affine) and quantizer.bits <= self.longest
        numbers = whole_numbers(quantizer)
        return numbers is not None and set(numbers) <= set(self.numbers)

    def encode(self, core: NMSparse) -> Bytes:
        """As in `BlockType`."""
        grid = core.grid
        assert grid is not None, "floating-point values are no codes"
        table = None
        if self.numbers is not None:
            numbers = whole_numbers(grid.quantizer) or ()
            table = np.array([self.numbers.index(number) for number in numbers], np.int16)
        codes = code_numbers(core, table).reshape(core.shape[0], -1, WIDTH)
        parts = [self._parameter(core, place) for place in range(len(grid.quantizer.stored))]
        block = Block(codes, *(piece for part in parts for piece in part))
        return self.pack(block).reshape(len(codes), -1)

    def _parameter(self, core: NMSparse, place: int) -> tuple[Bytes, Bytes]:
        """The integers of the groups of each block (rows, blocks, groups), and their super-scale (rows, blocks, 2)."""
        grid = core.grid
        assert grid is not None, "floating-point values are no codes"
        integers, supers = grid.stored[2 * place : 2 * place + 2]
        rows, columns = core.shape
        numbers = unpack(integers, grid.groups, grid.storage.bits).numpy().astype(np.uint8)
        each = numbers[:, np.arange(columns // self.group) * self.group // grid.group].reshape(
            rows, -1, WIDTH // self.group
        )
        starts = np.arange(columns // WIDTH) * WIDTH // (grid.group * grid.storage.span)
        heads = np.ascontiguousarray(supers.detach().numpy()[:, starts], "<f2")[..., None].view(np.uint8)
        return each, heads


def q2_k(block: Block) -> Bytes:
    """Integers of four bits, of scales in the low half; codes of two bits; d, dmin."""
    assert block.minima is not None, "the type has minima"
    assert block.dmin is not None, "the type has minima"
    integers = np.bitwise_or(block.scales, np.left_shift(block.minima, 4))
    return np.concatenate([integers, bits_of_codes(block.codes, 2, 32), block.d, block.dmin], axis=-1)


def q3_k(block: Block) -> Bytes:
    """Third bits of the codes, their low two bits, sixteen scales counted from −32 in six bits, d."""
    scales = block.scales + np.uint8(32)
    low = nibbles(scales)
    high = bits_of_codes(_above(scales, 4), 2, 4)
    thirds = bits_of_codes(_above(block.codes, 2), 1, 32)
    return np.concatenate([thirds, bits_of_codes(_below(block.codes, 2), 2, 32), low, high, block.d], axis=-1)


def q4_k(block: Block) -> Bytes:
    """d, dmin, the integers, codes as nibbles of two groups."""
    return np.concatenate([*_heads(block), bits_of_codes(block.codes, 4, 32)], axis=-1)


def q5_k(block: Block) -> Bytes:
    """d, dmin, the integers, the fifth bits of the codes, the rest as nibbles of two groups."""
    fifths = bits_of_codes(_above(block.codes, 4), 1, 32)
    return np.concatenate([*_heads(block), fifths, bits_of_codes(_below(block.codes, 4), 4, 32)], axis=-1)


def q6_k(block: Block) -> Bytes:
    """Codes counted from −32: nibbles of runs of 64, their upper two bits; scales of eight bits, d."""
    low, high = bits_of_codes(_below(block.codes, 4), 4, 64), bits_of_codes(_above(block.codes, 4), 2, 32)
    return np.concatenate([low, high, block.scales, block.d], axis=-1)


def iq4_xs(block: Block) -> Bytes:
    """d, the upper two bits of eight scales counted from −32, their low four bits, codes as nibbles of each group."""
    scales = block.scales + np.uint8(32)
    high = bits_of_codes(_above(scales, 4), 2, 1)
    low = bits_of_codes(_below(scales, 4), 4, 1)
    codes = nibbles(block.codes.reshape(*block.codes.shape[:2], 8, 32)).reshape(*block.codes.shape[:2], -1)
    return np.concatenate([block.d, high, low, codes], axis=-1)


def _heads(block: Block) -> tuple[Bytes, Bytes, Bytes]:
    """d, dmin, and eight scales and eight minima of six bits in twelve bytes: the upper two bits of the last four fill those of the first."""
    assert block.minima is not None, "the type has minima"
    assert block.dmin is not None, "the type has minima"
    first, last = np.split(np.stack([block.scales, block.minima], axis=-2), 2, axis=-1)  # (rows, blocks, 2, 4)
    starts = np.bitwise_or(first, np.left_shift(_above(last, 4), 6)).reshape(*first.shape[:2], 8)
    ends = np.bitwise_or(last[:, :, 0] & 15, np.left_shift(last[:, :, 1] & 15, 4))
    return block.d, block.dmin, np.concatenate([starts, ends], axis=-1)
