"""Models from `.gguf` files. Every key and tensor of a file must be known; others are errors that name it (`gguf_families`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError
from halfplate.models.gguf_families.configs import Contents
from halfplate.models.gguf_families.configs import read_config as config_of_contents
from halfplate.models.gguf_families.rope import ROPE_TENSORS
from halfplate.models.gguf_families.table import family_of_file
from halfplate.models.gguf_families.tensors import Values, check_names, read_values
from halfplate.models.gguf_header import GgufContents, GgufTensor, check_header

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LARGEST_ROPE = 2**20  # largest size in bytes of a tensor of rotary factors, which has one value per pair in a head


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file: architecture, pre-tokenizer and licence (None if not given), and the contents."""

    architecture: str
    pre_tokenizer: str | None
    contents: GgufContents
    licence: str | None = None


def read_header(path: Path, name: str) -> GgufHeader:
    """Read the metadata of a `.gguf` file. name: as the user gave it.

    Raises HalfplateError if the file is not a GGUF file, is truncated, or is one of several parts.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise HalfplateError(
            f"model={name!r} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'; download it again"
        )
    try:
        contents = check_header(path)
    except (ValueError, OverflowError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise HalfplateError(
            f"model={name!r} is cut short or damaged: {path.name} has {path.stat().st_size} bytes and "
            f"does not hold all that its header names ({reason}); download it again"
        ) from None
    splits = contents.metadata.get("split.count", 1)
    if isinstance(splits, int) and splits > 1:
        raise HalfplateError(
            f"model={name!r} is one of {splits} parts of a split GGUF file; "
            "join them with `llama-gguf-split --merge` and pass the joined file"
        )
    pre_tokenizer, licence = (contents.metadata.get(key) for key in ("tokenizer.ggml.pre", "general.license"))
    return GgufHeader(
        str(contents.metadata.get("general.architecture")),
        pre_tokenizer if isinstance(pre_tokenizer, str) else None,
        contents,
        licence if isinstance(licence, str) else None,
    )


def read_config(path: Path, name: str) -> "PretrainedConfig":
    """The configuration of the model; raises HalfplateError for an unsupported architecture and for an unknown key."""
    header = read_header(path, name)
    family = family_of_file(name, header.contents.metadata)
    with _described(name):
        rope = {
            key: load_values(path, entry).reshape(-1).tolist()
            for key, entry in header.contents.entries.items()
            if key in ROPE_TENSORS and entry.nbytes <= LARGEST_ROPE
        }
        shapes = {key: entry.shape for key, entry in header.contents.entries.items()}
        return config_of_contents(family, Contents(header.contents.metadata, shapes, rope))


def load_model(path: Path, name: str, config: "PretrainedConfig") -> "tuple[PreTrainedModel, dict[str, Any]]":
    """The model in fp32, and a report: `missing_keys`, and `mismatched_keys` with the shapes in the file and in the model."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with _described(name), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expected = {key: tensor.shape for key, tensor in model.state_dict(keep_vars=True).items()}
    tied = (model.all_tied_weights_keys or {}).keys()
    found: dict[str, Tensor] = {}
    mismatched = []
    read = tensor_reader(path, name, model)
    for key in expected:
        tensor = None if key in tied else read(key)
        if tensor is None:
            continue
        if tensor.shape == expected[key]:
            found[key] = tensor
        else:
            mismatched.append((key, tuple(tensor.shape), tuple(expected[key])))
    refused = {key for key, _, _ in mismatched}
    missing = [key for key in expected if key not in found and key not in tied and key not in refused]
    if not missing and not mismatched:
        model.load_state_dict(found, strict=False, assign=True)
        model.tie_weights()
    return model.eval(), {"missing_keys": missing, "mismatched_keys": mismatched}


def tensor_reader(path: Path, name: str, model: "PreTrainedModel") -> "Callable[[str], Tensor | None]":
    """A function that reads a tensor of `model` in fp32 by its name in the model. It returns None if the file lacks the tensor; a missing bias is zero.

    Raises HalfplateError for a tensor of the file that is not part of the model.
    """
    import torch

    contents = read_header(path, name).contents
    family = family_of_file(name, contents.metadata)
    tied = (model.all_tied_weights_keys or {}).keys()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict(keep_vars=True).items() if key not in tied}
    with _described(name):
        check_names(family, shapes, contents.entries)

    def load(part: str) -> "Values | None":
        return load_values(path, contents.entries[part]) if part in contents.entries else None

    def read(key: str) -> "Tensor | None":
        with _described(name):
            values = read_values(family, model.config, key, shapes[key], load)
        return None if values is None else torch.from_numpy(values)

    return read


def load_values(path: Path, entry: GgufTensor) -> "Values":
    """The values of a tensor, in fp32."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(entry.kind)
    raw = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.start)
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
    if plain is not None:
        return raw.view(plain).astype(np.float32).reshape(entry.shape)
    rows = raw.reshape(*entry.shape[:-1], -1)
    values: Values = dequantize(rows, kind).astype(np.float32).reshape(entry.shape)
    return values


def load_tokenizer(path: Path, name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer inside the file, which splits text as llama.cpp does (`gguf_tokenizer_reader`)."""
    from halfplate.models.gguf_tokenizer_reader import read_tokenizer

    with _described(name):
        return read_tokenizer(path, name)


@contextmanager
def _described(name: str) -> Iterator[None]:
    """Context manager that turns exceptions of libraries on the content of a file into a HalfplateError."""
    try:
        yield
    except HalfplateError:
        raise
    except Exception as error:
        raise _cannot_read(name, error) from None


def _cannot_read(name: str, error: Exception) -> HalfplateError:
    reason = str(error).strip().partition("\n")[0]
    return HalfplateError(
        f"model={name!r} cannot be read as GGUF: {reason}; pass the model as a safetensors folder instead"
    )
