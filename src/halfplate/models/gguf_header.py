"""The header of a GGUF file, checked against the size of the file before anything believes it.

Counts, lengths and offsets in it are a stranger's numbers: a reader that loops or allocates by them can be made to take all
memory. Layout: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MOST_DIMENSIONS = 4
LONGEST_NAME = 65_535
# Python objects that other readers make of the metadata, so many bytes for each in a file of a few.
MOST_ELEMENTS = 8_000_000


class DamagedHeader(ValueError):
    """A header that does not fit its file."""


@dataclass(frozen=True)
class GgufContents:
    """Tensors in the file, and the values in all of them."""

    tensors: int
    elements: int


def check_header(path: Path) -> GgufContents:
    """Walk the whole header; raises DamagedHeader unless every count, length, type and offset in it lies inside the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    blocks = {int(kind): GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        walk = _Walk(content)
        if walk.take(4) != MAGIC or walk.number("<I") not in VERSIONS:
            raise DamagedHeader("it is not GGUF of version 2 or 3")
        tensors, entries = walk.count(24), walk.count(13)
        alignment, keys = 32, set()
        for _ in range(entries):
            key = walk.text(LONGEST_NAME)
            if key in keys:
                raise DamagedHeader(f"the key {key[:60]!r} stands twice")
            keys.add(key)
            start = walk.place + 4
            walk.value(walk.number("<I"))
            if key == b"general.alignment":
                alignment = int.from_bytes(content[start : walk.place], "little")
        if alignment not in {1 << power for power in range(17)}:
            raise DamagedHeader(f"the alignment is {alignment}")
        elements, ends = 0, [0]
        for _ in range(tensors):
            walk.text(LONGEST_NAME)
            dimensions = walk.number("<I")
            if dimensions > MOST_DIMENSIONS:
                raise DamagedHeader(f"a tensor has {dimensions} dimensions")
            shape = [walk.number("<Q") for _ in range(dimensions)]
            kind, offset = walk.number("<I"), walk.number("<Q")
            if kind not in blocks:
                raise DamagedHeader(f"a tensor has the unknown type {kind}")
            values, (block, nbytes) = prod(shape), blocks[kind]
            if offset % alignment or (shape and shape[0] % block):
                raise DamagedHeader("a tensor is not aligned")
            elements += values
            ends.append(offset + values // block * nbytes)
        data = -(-walk.place // alignment) * alignment
        if data + max(ends) > len(content) and tensors:
            raise DamagedHeader(f"its tensors need {data + max(ends)} bytes")
        return GgufContents(tensors, elements)


class _Walk:
    """Reading a file from its beginning; nothing is taken from behind its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place, self.elements = content, 0, 0

    def take(self, length: int) -> bytes:
        if length > len(self.content) - self.place:
            raise DamagedHeader(f"byte {self.place} asks for {length} more than there are")
        self.place += length
        return self.content[self.place - length : self.place]

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def count(self, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        number = self.number("<Q")
        self.elements += number
        if number * least > len(self.content) - self.place or self.elements > MOST_ELEMENTS:
            raise DamagedHeader(f"it counts {number} where the file has no room for them")
        return number

    def text(self, longest: int) -> bytes:
        length = self.number("<Q")
        if length > longest:
            raise DamagedHeader(f"a name has {length} bytes")
        return self.take(length)

    def value(self, kind: int, inside: bool = False) -> None:
        if kind == STRING:
            self.text(len(self.content))
        elif kind == ARRAY and not inside:
            item = self.number("<I")
            number = self.count(8 if item == STRING else SCALAR_BYTES.get(item, 1))
            if item in SCALAR_BYTES:
                self.take(number * SCALAR_BYTES[item])
                return
            for _ in range(number):
                self.value(item, inside=True)
        elif kind in SCALAR_BYTES:
            self.take(SCALAR_BYTES[kind])
        else:
            raise DamagedHeader(f"a value has the unknown type {kind}")
