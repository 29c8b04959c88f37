"""The solved candidates of every matrix, kept until a search has chosen."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, WeightSpec
from halfplate.storage.tensor_file import read_header, read_tensors, write_file

MEMORY_BYTES = 2 * 2**30  # further candidates are stored in a temporary folder


class LevelStore:
    """Matrices by a key of two numbers, in memory or in files of a temporary folder.

    A context manager; leaving it deletes the files.

    memory_bytes: limit for the matrices in memory.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._room = memory_bytes
        self._held: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._specs: dict[tuple[int, int], list[WeightSpec]] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> LevelStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: tuple[int, int], matrices: list[Chain]) -> None:
        """Store `matrices`, which share the input wrapper of the first if their specifications say so.

        Raises HalfplateError if the disk of the temporary folder is full.
        """
        tensors = {f"{k}.{name}": part for k, chain in enumerate(matrices) for name, part in chain.tensors().items()}
        self._specs[key] = [chain.spec for chain in matrices]
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if nbytes <= self._room:
            self._room -= nbytes
            self._held[key] = tensors
            return
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="halfplate-levels-")
        try:
            write_file(self._file(key), tensors, durable=False)
        except OSError as error:
            raise HalfplateError(
                f"candidates could not be written to {self._folder.name!r} ({' '.join(str(error).split())}); free some space there, "
                "or set TMPDIR to another folder"
            ) from error

    def dense(self, key: tuple[int, int], device: torch.device) -> list[Tensor]:
        """The full matrices stored under `key`: fp32 (d_out, d_in) each."""
        tensors = self._held[key] if key in self._held else dict(read_tensors(read_header(self._file(key))))
        found = []
        for k, spec in enumerate(self._specs[key]):
            own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{k}.")}
            if spec.in_shared is not None:
                own |= {name: tensors[f"0.{name}"] for name in spec.borrowed}
            found.append(Chain.from_tensors(spec, {name: tensor.to(device) for name, tensor in own.items()}).dense())
        return found

    def _file(self, key: tuple[int, int]) -> Path:
        assert self._folder is not None, "nothing was spilled"
        return Path(self._folder.name) / f"{key[0]}-{key[1]}.safetensors"
