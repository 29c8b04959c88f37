"""Comparing a written GGUF file with the model that it was made of, value for value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfplate.errors import HalfplateError
from halfplate.models.gguf import load_values, read_header
from halfplate.models.gguf_families.table import family_of_model
from halfplate.models.gguf_families.tensors import write_values
from halfplate.models.gguf_tensors import StoredTensor


@dataclass(frozen=True)
class Comparison:
    """Number of tensors of the file, those equal to the model value for value, and the names in the model of all others.

    rounded: held in a type of fewer bits than the model's, and equal to the values rounded to it.
    """

    tensors: int
    rounded: tuple[str, ...]


def compare(path: Path, config: Any, tensors: dict[str, StoredTensor]) -> Comparison:
    """Read the file `path` and compare every tensor with the values it was made of.

    config: of the model. tensors: what `write_gguf` returned.
    Raises HalfplateError, naming the tensor, for a file that lacks one or holds other values than were meant.
    """
    family, entries = family_of_model(config.model_type), read_header(path, path.name).contents.entries
    count, rounded = 0, []
    for key, stored in tensors.items():
        for name, wanted in write_values(family, config, key, stored.values()):
            if name not in entries or entries[name].shape != wanted.shape:
                raise _differs(path, name, "is missing or has another shape")
            found = load_values(path, entries[name])
            count += 1
            if np.array_equal(found, wanted):
                continue
            if not stored.rounds:
                raise _differs(
                    path, name, f"differs from {key} at {int((found != wanted).sum())} of {found.size} values"
                )
            meant = dict(write_values(family, config, key, stored.decoded()))[name]
            if not np.array_equal(found, meant):
                raise _differs(path, name, f"is not {key} rounded to {stored.kind}")
            rounded.append(key)
    return Comparison(count, tuple(rounded))


def _differs(path: Path, name: str, what: str) -> HalfplateError:
    return HalfplateError(
        f"out={str(path)!r}: read back, the tensor {name} {what}; the disk or memory may be faulty, write it again or report this"
    )
