"""A model whose files hold its tensors in another form, rewritten once so that its blocks can be read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.models import gguf
from halfplate.models.sources import Source, load_dense, skeleton
from halfplate.models.weight_files import find_weight_files
from halfplate.storage.shards import SINGLE
from halfplate.storage.tensor_file import DamagedFile, TensorFileWriter, read_header, sha256_of


def convert_tensors(source: Source, folder: Path, progress: Callable[[int, int], None]) -> dict[str, str]:
    """Write the tensors of `source`, in fp32 under the names of the model, to a file in `folder`.

    A GGUF file is read tensor by tensor. Where transformers joins tensors (experts) the model is held whole.
    progress: called with the tensors written and in all. Returns the SHA-256 of each. Raises HalfplateError where tensors are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source.gguf_header is not None:
        model = skeleton(source)
        tensors: Iterator[tuple[str, Tensor]] = gguf.read_tensors(source.path, source.name, model)
        state = model.state_dict()
    else:
        loaded = load_dense(source).model
        state = loaded.state_dict()
        tensors = iter(state.items())
        model = loaded
    tied = {name for name, origin in (model.all_tied_weights_keys or {}).items() if origin in state}
    entries = {
        name: (torch.float32 if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in state.items()
        if name not in tied
    }
    written: dict[str, str] = {}
    with TensorFileWriter(folder / SINGLE, entries) as file:
        for name, tensor in tensors:
            if name not in entries:
                continue
            if tuple(tensor.shape) != entries[name][1]:
                raise HalfplateError(
                    f"model={source.name!r}: {name} has shape {tuple(tensor.shape)} in its file, its configuration asks for {entries[name][1]}; "
                    "download the model again"
                )
            written[name] = file.write(name, tensor.to(entries[name][0]))
            progress(len(written), len(entries))
    missing = sorted(entries.keys() - written.keys())
    if missing:
        raise HalfplateError(
            f"model={source.name!r}: its files lack {len(missing)} tensors that its configuration asks for ({missing[0]}, ...); "
            "they would be random: download the model again"
        )
    return written


def whole(folder: Path, sha256: Mapping[str, str]) -> bool:
    """Whether `folder` holds what `convert_tensors` wrote there, whose checksums are `sha256`."""
    try:
        found = read_header(folder / SINGLE)
        return found.keys() == sha256.keys() and all(sha256_of(found[name]) == sha256[name] for name in found)
    except (OSError, DamagedFile):
        return False


def converted(source: Source, folder: Path) -> Source:
    """`source` with its tensors where `convert_tensors` wrote them."""
    return replace(source, tensors=find_weight_files(source.name, folder).tensors)
