"""The header of a GGUF file, checked against the size of the file before it is used.

Counts, lengths and offsets in it are untrusted: they could make a reader loop or allocate without limit. The layout is that
of the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SCALAR_BYTES = {kind: struct.calcsize(f"<{form}") for kind, form in SCALARS.items()}
MOST_DIMENSIONS = 4
LONGEST_NAME = 65_535
# Limit for array items in the metadata: other readers create several Python objects for each of them.
MOST_ELEMENTS = 8_000_000
LONGEST_KEPT = 4096  # most array values or string bytes that are kept: settings have fewer, vocabularies more


class DamagedHeader(ValueError):
    """A header that does not match its file."""


@dataclass(frozen=True)
class GgufTensor:
    """The location of a tensor: `shape` (rows first), ggml's type number, its first byte in the file and its size in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufContents:
    """Number of tensors and of all values in them; the metadata without long arrays and texts; each tensor by name."""

    tensors: int
    elements: int
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    entries: dict[str, GgufTensor] = field(default_factory=dict, hash=False)


def check_header(path: Path) -> GgufContents:
    """Check the whole header; raises DamagedHeader unless every count, length, type and offset is within the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    blocks = {int(kind): GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        walk = _Walk(content)
        if walk.take(4) != MAGIC or walk.number("<I") not in VERSIONS:
            raise DamagedHeader("it is not GGUF of version 2 or 3")
        tensors, entries = walk.count(24), walk.count(13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = walk.name()
            if key in metadata:
                raise DamagedHeader(f"the key {key[:60]!r} occurs twice")
            metadata[key] = walk.value(walk.number("<I"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in {1 << power for power in range(17)}:
            raise DamagedHeader(f"the alignment is {alignment}")
        elements = 0
        found: dict[str, GgufTensor] = {}
        for _ in range(tensors):
            name = walk.name()
            if name in found:
                raise DamagedHeader(f"the tensor {name[:60]!r} occurs twice")
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
            found[name] = GgufTensor(tuple(reversed(shape)), kind, offset, values // block * nbytes)
        data = -(-walk.place // alignment) * alignment
        end = data + max((one.start + one.nbytes for one in found.values()), default=0)
        if end > len(content) and tensors:
            raise DamagedHeader(f"its tensors need {end} bytes")
        placed = {name: replace(one, start=data + one.start) for name, one in found.items()}
        return GgufContents(tensors, elements, {key: one for key, one in metadata.items() if one is not None}, placed)


class _Walk:
    """Reads a file from its beginning and never beyond its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place, self.elements = content, 0, 0

    def take(self, length: int) -> bytes:
        if length > len(self.content) - self.place:
            raise DamagedHeader(f"byte {self.place} asks for {length} more than there are")
        self.place += length
        return self.content[self.place - length : self.place]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, least: int) -> int:
        """A number of items that take at least `least` bytes each."""
        number: int = self.number("<Q")
        self.elements += number
        if number * least > len(self.content) - self.place or self.elements > MOST_ELEMENTS:
            raise DamagedHeader(f"it counts {number} entries, more than the file can hold")
        return number

    def text(self, longest: int) -> bytes:
        length = self.number("<Q")
        if length > longest:
            raise DamagedHeader(f"a name has {length} bytes")
        return self.take(length)

    def name(self) -> str:
        return self.text(LONGEST_NAME).decode("utf-8", "backslashreplace")

    def value(self, kind: int, inside: bool = False) -> Any:
        """The value at the current position; None if it is longer than any setting of a model."""
        if kind == STRING:
            text = self.text(len(self.content))
            return text.decode("utf-8", "backslashreplace") if len(text) <= LONGEST_KEPT else None
        if kind == ARRAY and not inside:
            item = self.number("<I")
            number = self.count(8 if item == STRING else SCALAR_BYTES.get(item, 1))
            if item in SCALAR_BYTES:
                content = self.take(number * SCALAR_BYTES[item])
                return list(struct.unpack(f"<{number}{SCALARS[item]}", content)) if number <= LONGEST_KEPT else None
            for _ in range(number):
                self.value(item, inside=True)
            return None
        if kind in SCALAR_BYTES:
            return self.number(f"<{SCALARS[kind]}")
        raise DamagedHeader(f"a value has the unknown type {kind}")
