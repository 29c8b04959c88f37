"""Converting stored tensors to the layout of the model: GGUF files, and tensors that transformers makes of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halfplate.models import gguf
from halfplate.models.experts.stored import parts_of
from halfplate.models.fit import converters_by_pattern, match, names_in_model
from halfplate.models.reading import reading
from halfplate.models.sources import CORRECT, Source, skeleton
from halfplate.storage.tensor_file import StoredTensor, read_tensor
from halfplate.transforms.base import Maker, Piece, Transform


class Conversion(Transform):
    """Changes the layout but not the values; applied automatically to every model that needs it."""

    name = "conversion"
    version = 2
    summary = "write the tensors of a GGUF file, or tensors that transformers makes of others, in the form of the model"

    def refusal(self, source: Source) -> str | None:
        return None if needs_conversion(source) else "its tensors are in the form of the model already"

    def open(self, source: Source) -> Maker:
        make = _of_folder(source) if source.gguf_header is None else _of_gguf(source)
        return _with_linear_experts(source, make)


CONVERSION = Conversion()


def needs_conversion(source: Source) -> bool:
    """Whether the layout of the files differs from that of the model: a GGUF file, or tensors that transformers makes of others.

    Experts that are stored one by one, or all in one tensor, need no conversion.
    """
    if source.in_model_form:
        return False
    if source.gguf_header is not None:
        return True
    return bool(match(skeleton(source), source.tensors).made)


def _with_linear_experts(source: Source, make: Maker) -> Maker:
    """Make the tensors of each expert out of those of all experts, which `make` makes."""
    parts = parts_of(skeleton(source))

    def made(piece: Piece) -> Iterator[tuple[str, Tensor]]:
        inside: dict[str, list[str]] = defaultdict(list)
        for name in piece.entries:
            inside[parts[name][0] if name in parts else name].append(name)
        joined = dict.fromkeys(inside, (torch.float32, ()))
        for key, tensor in make(replace(piece, entries=joined)):
            for name in inside.get(key, [key]):
                if name in parts:
                    yield name, parts[name][1](tensor).contiguous()
                else:
                    yield name, tensor

    return made


def _of_gguf(source: Source) -> Maker:
    read = gguf.tensor_reader(source.path, source.name, skeleton(source, joined=True))

    def make(piece: Piece) -> Iterator[tuple[str, Tensor]]:
        for name in piece.entries:
            if (tensor := read(name)) is not None:
                yield name, tensor

    return make


def _of_folder(source: Source) -> Maker:
    """Convert with transformers' own conversions, from the parts of one tensor at a time."""
    from transformers.core_model_loading import dot_natural_key

    model = skeleton(source, buffers=True, joined=True)
    state, converters = model.state_dict(keep_vars=True), converters_by_pattern(model)
    parts: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    # In the order in which transformers joins experts.
    for part, (name, pattern) in names_in_model(model, sorted(source.tensors, key=dot_natural_key)).items():
        parts[name].append((part, pattern))
    stored_as = {origin: name for name, origin in (model.all_tied_weights_keys or {}).items() if name in parts}

    def converted(name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensor `name`, and all tensors made from the same parts."""
        readers = [(pattern, _reader(source.tensors[part], state[name].dtype), part) for part, pattern in parts[name]]
        pattern, read, _ = readers[0]
        if pattern is None:
            yield name, read()
            return
        converter = deepcopy(converters[pattern])
        for matched, read, part in readers:
            converter.add_tensor(name, part, matched, read)
        with reading(source.name, f"{name} cannot be made of its parts", CORRECT):
            found: dict[str, Any] = converter.convert(name, model=model, config=model.config)
        for result in list(found):
            yield result, _only(found.pop(result))

    def make(piece: Piece) -> Iterator[tuple[str, Tensor]]:
        for name in piece.entries:
            if name in parts:
                yield from converted(name)
            elif name in stored_as:
                yield from ((name, tensor) for _, tensor in converted(stored_as[name]))
            elif not state[name].is_meta:
                # Computed and not in the files; taken from transformers.
                yield name, state[name]

    return make


def _reader(stored: StoredTensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: read_tensor(stored).to(dtype)


def _only(found: Tensor | list[Tensor]) -> Tensor:
    return found[0] if isinstance(found, list) else found
