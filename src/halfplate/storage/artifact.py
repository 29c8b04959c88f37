"""Artifacts: tensors and facts that an unfinished run keeps, each whole and checksummed, or not there."""

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
    """A finished piece on disk: its tensors, the SHA-256 of each, and what else is known of it."""

    path: Path
    tensors: dict[str, StoredTensor]
    sha256: dict[str, str]
    facts: dict[str, Any]

    def damaged(self) -> str | None:
        """The first tensor whose bytes are not those that were written, read anew from the disk."""
        try:
            return next((name for name, at in self.tensors.items() if sha256_of(at) != self.sha256[name]), None)
        except (OSError, DamagedFile) as error:
            return str(error)


def save_artifact(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any], durable: bool = True) -> None:
    """Write an artifact: tensors to `path`, the rest beside it; it counts only once both are there.

    facts: values of JSON, for example `{"seconds": 1.5}`. durable: they are on the disk when this returns.
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
    """`save_artifact` of tensors that come one at a time, in any order; entries: element type and shape of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        with TensorFileWriter(partial, entries, durable) as file:
            sha256 = {}
            for name, tensor in tensors:
                sha256[name] = file.write(name, tensor)
                del tensor  # before the next one is made
        note(path).unlink(missing_ok=True)
    write_json(note(path), {"version": VERSION, "sha256": sha256, "facts": facts}, durable)


def load_artifact(path: Path) -> Artifact | None:
    """The artifact at `path`; None if there is none, or none that is whole as far as its header and its note tell."""
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
    """Remove an artifact, its note first, without which the rest does not count."""
    note(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def note(path: Path) -> Path:
    """The file of JSON beside the tensors of an artifact."""
    return path.with_suffix(".json")


def write_json(path: Path, content: dict[str, Any], durable: bool = True) -> None:
    """Write JSON with a checksum of its own, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, sort_keys=True)
    with whole_file(path, durable) as partial:
        partial.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None if it is absent or damaged."""
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    text = text.removesuffix("\n")
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        return None
    content: dict[str, Any] = json.loads(text)
    return content
