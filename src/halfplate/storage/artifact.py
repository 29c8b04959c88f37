"""Artifacts: tensors and facts of an unfinished run with checksums, which exist completely or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.storage.atomic import whole_file
from halfplate.storage.tensor_file import DamagedFile, StoredTensor, TensorFileWriter, read_header, sha256_of

VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk: its tensors, the SHA-256 of each, and its facts."""

    path: Path
    tensors: dict[str, StoredTensor]
    sha256: dict[str, str]
    facts: dict[str, Any]

    def damaged(self) -> str | None:
        """The first tensor with a wrong checksum, read from the disk; None if all are correct."""
        try:
            return next((name for name, at in self.tensors.items() if sha256_of(at) != self.sha256[name]), None)
        except (OSError, DamagedFile) as error:
            return str(error)


def save_artifact(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any], durable: bool = True) -> None:
    """Write an artifact: tensors to `path`, and a note next to it. It only counts once both exist.

    facts: JSON values, for example `{"seconds": 1.5}`.
    durable: data is on the disk on return.
    """
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_artifact_of(path, entries, tensors.items(), facts, durable)


def save_artifact_of(
    path: Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    facts: dict[str, Any],
    durable: bool = True,
) -> None:
    """`save_artifact` for tensors that are produced one at a time, in any order; entries: element type and shape of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        with TensorFileWriter(partial, entries, durable) as file:
            sha256 = {}
            for name, tensor in tensors:
                sha256[name] = file.write(name, tensor)
                del tensor  # freed before the next one is produced
        note(path).unlink(missing_ok=True)
    write_json(note(path), {"version": VERSION, "sha256": sha256, "facts": facts}, durable)


def load_artifact(path: Path) -> Artifact | None:
    """The artifact at `path`; None if there is none, or if its header or note is incomplete."""
    content = read_json(note(path))
    if content is None or content.get("version") != VERSION:
        return None
    try:
        tensors = read_header(path)
    except (OSError, DamagedFile):
        return None
    sha256 = content["sha256"]
    return Artifact(path, tensors, sha256, content["facts"]) if sha256.keys() == tensors.keys() else None


def remove_artifact(path: Path) -> None:
    """Remove an artifact, its note first, so that a partly removed one does not count."""
    note(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def note(path: Path) -> Path:
    """The JSON file next to the tensors of an artifact."""
    return path.with_suffix(".json")


def write_json(path: Path, content: dict[str, Any], durable: bool = True) -> None:
    """Write JSON with a checksum, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, sort_keys=True)
    with whole_file(path, durable) as partial:
        partial.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The value that `write_json` wrote; None if it is missing or damaged."""
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    text = text.removesuffix("\n")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        return None
    content: dict[str, Any] = json.loads(text)
    return content
