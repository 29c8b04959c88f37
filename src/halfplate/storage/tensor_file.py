"""Reading and writing safetensors files tensor by tensor, by pread and pwrite, because pages of a mapped file count as resident memory."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.errors import HalfplateError

# In the order in which the safetensors library sorts the tensors of a file.
KINDS = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: kind for kind, dtype in KINDS.items()}
# Types of codes, which are read but never written.
CODES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
READ = KINDS | CODES
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
METADATA = "__metadata__"
PIECE = 2**24  # bytes copied or hashed at once


@dataclass(frozen=True)
class Arrangement:
    """How a matrix lies among the stored values that are read for it.

    shape: of these values.
    transposed: they are stored as (columns, rows).
    first, end, step: its rows are those from `first` to before `end`, in steps of `step`.
    """

    shape: tuple[int, ...]
    transposed: bool
    first: int
    end: int
    step: int

    def of(self, values: Tensor) -> Tensor:
        """The matrix inside `values`, contiguous."""
        rows = values.T if self.transposed else values
        return rows[self.first : self.end : self.step].contiguous()


@dataclass(frozen=True)
class Encoded:
    """A tensor that is stored as codes.

    parts: the stored tensors that describe it, with their names.
    decode: turns them into fp32 values. It can be pickled, because tasks read tensors in other processes.
    """

    parts: tuple[tuple[str, StoredTensor], ...]
    decode: Callable[[Mapping[str, Tensor]], Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for _, part in self.parts)

    def values(self) -> Tensor:
        """The decoded values, fp32."""
        return self.decode({name: read_tensor(part) for name, part in self.parts})

    def one_of(self, number: int) -> Encoded:
        """The matrix `number` of a tensor of several; the first dimension of every part counts them."""
        return replace(self, parts=tuple((name, part.one_of(number)) for name, part in self.parts))


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor.

    kind: element type in safetensors' notation.
    start: its first byte in the file.
    nbytes: that are read for it.
    arranged: how it lies among them, if they are not its values in order.
    encoded: its codes, if it is stored as codes; then path and start are those of the first of them, and kind is what its values are rounded to.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    arranged: Arrangement | None = None
    encoded: Encoded | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The element type; raises KeyError for types that are not of plain numbers, such as F8."""
        return KINDS[self.kind]

    @property
    def values_nbytes(self) -> int:
        """Bytes of its values in memory."""
        return prod(self.shape) * self.dtype.itemsize

    def one_of(self, number: int) -> StoredTensor:
        """The part `number` along the first dimension, without that dimension."""
        if self.encoded is not None:
            one = self.encoded.one_of(number)
            first = one.parts[0][1]
            return replace(
                self, shape=self.shape[1:], path=first.path, start=first.start, nbytes=one.nbytes, encoded=one
            )
        each = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + number * each, nbytes=each)


class DamagedFile(HalfplateError):
    """A safetensors file is incomplete or damaged. reason: the message without the advice."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; download it again")
        self.reason = reason


def read_header(path: Path, whole: bool = True) -> dict[str, StoredTensor]:
    """Every tensor of the file by name, in the order of the header; raises DamagedFile unless the file holds them all.

    whole: False allows a file whose end is missing.
    """
    status = path.stat()
    size = status.st_size
    # Opening a pipe would wait for a writer, and a device has no end.
    if not stat.S_ISREG(status.st_mode):
        raise DamagedFile(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise DamagedFile(f"{path.name} is cut short or damaged: it has {size} bytes, its header alone {length}")
        text = file.read(length)
    found: dict[str, StoredTensor] = {}
    try:
        header: dict[str, Any] = json.loads(text, object_pairs_hook=_unique)
        header.pop(METADATA, None)
        for name, entry in header.items():
            start, end = (int(at) for at in entry["data_offsets"])
            shape = tuple(entry["shape"])
            kind = str(entry["dtype"])
            if not all(type(side) is int and side >= 0 for side in shape):
                raise ValueError(f"{name[:80]!r} has no place in it")
            wrong = kind in READ and end - start != prod(shape) * READ[kind].itemsize
            if not 0 <= start <= end or wrong:
                raise ValueError(f"{name[:80]!r} has no place in it")
            found[name] = StoredTensor(path, kind, shape, 8 + length + start, end - start)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"the header of {path.name} is damaged ({error!r})") from None
    needed = max((tensor.start + tensor.nbytes for tensor in found.values()), default=8 + length)
    if whole and size < needed:
        raise DamagedFile(f"{path.name} is cut short: it has {size} bytes, its header names {needed}")
    _check_covered(path, found, 8 + length, size if whole else needed)
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a file that passes `read_header`, by name."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found: dict[str, str] = header.get(METADATA, {})
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with unique names, because readers differ in which of two equal names they use."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs in it twice")
    return found


def _check_covered(path: Path, found: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Raise DamagedFile unless the tensors follow each other without gaps to the end of the file, as the format requires.

    Overlapping tensors could describe any number of values in a small file.
    """
    end = start
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            raise DamagedFile(f"{path.name} is damaged: {name[:80]!r} does not begin where the tensor before it ends")
        end += tensor.nbytes
    if end != size:
        raise DamagedFile(f"{path.name} is damaged: {size - end} bytes in it belong to no tensor")


def read_tensor(stored: StoredTensor) -> Tensor:
    """The values of a tensor in newly allocated memory; raises DamagedFile if the file has become shorter."""
    if stored.encoded is not None:
        tensor = stored.encoded.values().to(stored.dtype)
    else:
        shape = stored.shape if stored.arranged is None else stored.arranged.shape
        tensor = torch.empty(shape, dtype=READ[stored.kind], device="cpu")
        with stored.path.open("rb", buffering=0) as file:
            _read_into(file.fileno(), stored.start, memoryview(_bytes(tensor)), stored.path)
    return tensor if stored.arranged is None else stored.arranged.of(tensor)


def read_rows(stored: StoredTensor, rows: Tensor) -> Tensor:
    """Some rows of a matrix in newly allocated memory. rows: int64 (n,), ascending; neighbouring ones are read at once."""
    values = torch.empty((len(rows), *stored.shape[1:]), dtype=KINDS[stored.kind], device="cpu")
    data, each = memoryview(_bytes(values)), stored.nbytes // max(stored.shape[0], 1)
    starts = [0, *((rows.diff() != 1).nonzero()[:, 0] + 1).tolist()] if len(rows) else []
    with stored.path.open("rb", buffering=0) as file:
        for start, end in pairwise([*starts, len(rows)]):
            place = stored.start + int(rows[start]) * each
            _read_into(file.fileno(), place, data[start * each : end * each], stored.path)
    return values


def read_tensors(found: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, one at a time, file by file."""
    for name in sorted(found, key=lambda name: (found[name].path, name)):
        yield name, read_tensor(found[name])


def sha256(tensor: Tensor) -> str:
    """Hexadecimal SHA-256 of the bytes of a tensor in memory, in their stored order."""
    return hashlib.sha256(memoryview(_bytes(tensor.detach().cpu().contiguous()))).hexdigest()


def sha256_of(stored: StoredTensor) -> str:
    """Hexadecimal SHA-256 of the bytes of a stored tensor, or of the values of one that is stored as codes."""
    if stored.encoded is not None:
        return sha256(read_tensor(stored))
    digest = hashlib.sha256()
    for piece in pieces(stored):
        digest.update(piece)
    return digest.hexdigest()


def pieces(stored: StoredTensor) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces; each is valid until the next one."""
    buffer = memoryview(bytearray(min(PIECE, stored.nbytes)))
    with stored.path.open("rb", buffering=0) as file:
        for done in range(0, stored.nbytes, PIECE):
            piece = buffer[: min(PIECE, stored.nbytes - done)]
            _read_into(file.fileno(), stored.start + done, piece, stored.path)
            yield piece


def usual_order(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The names in the order of the safetensors library, in which every tensor begins at a multiple of the size of its elements."""
    order = list(KINDS)
    return sorted(entries, key=lambda name: (order.index(NAMES[entries[name][0]]), name))


class TensorFileWriter:
    """A new safetensors file of the tensors `entries` (element type and shape by name), written one at a time.

    The result equals the file of `safetensors.torch.save_file` with this metadata, byte for byte. Use it as a context manager.

    durable: the file is on disk at the end of the block.
    metadata: at most one text, because the order of several is not defined.
    in_order: the tensors lie in the order of `entries`, and not by their types, as that function sorts them.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        durable: bool = True,
        metadata: Mapping[str, str] | None = None,
        in_order: bool = False,
    ) -> None:
        self._durable = durable
        header: dict[str, Any] = {METADATA: {"format": "pt"} if metadata is None else dict(metadata)}
        spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in entries if in_order else usual_order(entries):
            dtype, shape = entries[name]
            start, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            spans[name] = (start, end - start)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._path, self._entries = path, dict(entries)
        self._spans = {name: (8 + len(text) + start, size) for name, (start, size) in spans.items()}
        self._end = 8 + len(text) + end
        self._head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> TensorFileWriter:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(self._descriptor, self._end)
        _write(self._descriptor, 0, memoryview(self._head))
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            if failure[0] is None and self._durable:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, name: str, tensor: Tensor) -> str:
        """Write the tensor `name`; returns the SHA-256 of its bytes."""
        assert (tensor.dtype, tuple(tensor.shape)) == self._entries[name], name
        data = memoryview(_bytes(tensor.detach().cpu().contiguous()))
        _write(self._descriptor, self._spans[name][0], data)
        return hashlib.sha256(data).hexdigest()

    def copy(self, name: str, stored: StoredTensor) -> str:
        """Write the tensor `name` from another file, without holding it completely unless it is stored as codes; returns the SHA-256 of its bytes."""
        if stored.encoded is not None:
            return self.write(name, read_tensor(stored))
        at, size = self._spans[name]
        assert (KINDS[stored.kind], stored.shape, stored.nbytes) == (*self._entries[name], size), name
        digest = hashlib.sha256()
        for piece in pieces(stored):
            _write(self._descriptor, at, piece)
            digest.update(piece)
            at += len(piece)
        return digest.hexdigest()


def write_file(
    path: Path, tensors: Mapping[str, Tensor], durable: bool = True, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write all of `tensors` to a new file (see TensorFileWriter); returns the SHA-256 of each."""
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(path, entries, durable, metadata) as file:
        return {name: file.write(name, tensor) for name, tensor in tensors.items()}


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _read_into(descriptor: int, start: int, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], start + done)
        if not got:
            raise DamagedFile(
                f"{path.name} ends at byte {start + done}, expected {len(buffer) - done} more; it changed while it was read"
            )
        done += got


def _write(descriptor: int, start: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)
