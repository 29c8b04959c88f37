"""Converting tensor names and values between GGUF files and transformers, in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfplate.models.gguf_families.family import Family
from halfplate.models.gguf_families.keys import Unreadable
from halfplate.models.gguf_families.rope import FACTORS, LONG, ROPE_TENSORS, SHORT

Values = NDArray[np.float32]
BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


def names_in_file(family: Family, name: str) -> tuple[str, ...]:
    """The tensors of the file that make up the tensor `name` of the model; () if the family has no such tensor."""
    if match := BLOCK.fullmatch(name):
        number, rest = match.groups()
        whole = family.block.get(rest)
        if isinstance(whole, tuple):
            return tuple(f"blk.{number}.{part}" for part in whole)
        module, _, leaf = rest.rpartition(".")
        base = family.block.get(module)
        return (f"blk.{number}.{base}.{leaf}",) if isinstance(base, str) else ()
    module, _, leaf = name.rpartition(".")
    base = family.outer.get(module)
    return (f"{base}.{leaf}",) if isinstance(base, str) else ()


def check_names(family: Family, expected: Iterable[str], held: Iterable[str]) -> None:
    """Raise Unreadable for a tensor of the file (`held`) that belongs to no tensor of the model (`expected`)."""
    known = {part for name in expected for part in names_in_file(family, name)}
    if family.rope.factors:
        known.add(FACTORS)
    if family.rope.longrope:
        known |= {LONG, SHORT}
    for name in held:
        if name not in known:
            raise Unreadable(f"the tensor {name} is not part of a {family.model_type} model with this configuration")


def read_values(
    family: Family, config: Any, name: str, shape: tuple[int, ...], load: Callable[[str], Values | None]
) -> Values | None:
    """The tensor `name` of the model; None if the file lacks a part of it. A missing bias is zero.

    load: returns a tensor of the file, or None.
    """
    parts = [load(part) for part in names_in_file(family, name)]
    if not parts or any(part is None for part in parts):
        return np.zeros(shape, np.float32) if name.endswith(".bias") else None
    found = [part for part in parts if part is not None]
    values = found[0] if len(found) == 1 else np.concatenate(found, axis=1)
    if (heads := _turned(family, config, name)) and values.size == np.prod(shape):
        # Neighbouring values move to the two halves.
        values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if family.offset and name.endswith("norm.weight"):
        values = values - np.float32(family.offset)
    return np.ascontiguousarray(values, np.float32)


def write_values(family: Family, config: Any, name: str, values: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
    """Names and values of the tensors of the file that hold the tensor `name`; raises Unreadable if it has no name there.

    values: numbers, or bytes of the rows of a matrix, which move as its values would.
    """
    parts = names_in_file(family, name)
    if not parts:
        raise Unreadable(f"llama.cpp's {family.architecture} has no tensor for {name}")
    if heads := _turned(family, config, name):
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if family.offset and name.endswith("norm.weight"):
        values = values + np.float32(family.offset)
    pieces = [values] if len(parts) == 1 else np.split(values, len(parts), axis=1)
    return [(part, np.ascontiguousarray(piece)) for part, piece in zip(parts, pieces, strict=True)]


def _turned(family: Family, config: Any, name: str) -> int:
    """The number of heads whose rows are reordered in the tensor `name`; 0 if none."""
    match = BLOCK.fullmatch(name)
    field = HEADS.get(match[2].rpartition(".")[0]) if match and family.turned else None
    return int(getattr(config, field) or config.num_attention_heads) if field else 0


__all__ = ["ROPE_TENSORS", "check_names", "names_in_file", "read_values", "write_values"]
