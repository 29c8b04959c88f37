"""Writing a model as a GGUF file for llama.cpp, with its tokenizer, through the `gguf` package."""

from collections import Counter
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedMatrix
from halfplate.models.gguf_families.configs import check_written, write_metadata
from halfplate.models.gguf_families.keys import Unreadable
from halfplate.models.gguf_families.table import family_of_model
from halfplate.models.gguf_families.tensors import names_in_file, write_values
from halfplate.models.gguf_tensors import StoredTensor, stored_tensors
from halfplate.models.gguf_tokenizer_writer import add_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLOATS = ("F32", "F16", "BF16")


def write_gguf(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    path: Path,
    half: bool = True,
    embedding_type: str | None = None,
) -> dict[str, StoredTensor]:
    """Write a model, compressed or not, and return what the file holds of each of its tensors.

    Compressed matrices keep their codes and scales where ggml has a type for them. Other matrices are written as F16 (half) or
    F32, and norms, biases and routers as F32. Without a tokenizer, the file only knows token ids.

    embedding_type: as in `stored_tensors`.
    Raises HalfplateError for an unsupported architecture, for settings that llama.cpp does not support, for a tokenizer that
    cannot be written, and for weights beyond the range of F16.
    """
    import gguf

    family = family_of_model(model.config.model_type)
    config: Any = _config_as_written(model)
    tensors = stored_tensors(model, family, half, embedding_type)
    try:
        metadata, rope = write_metadata(family, config)
        shapes: dict[str, tuple[int, ...]] = {name: values.shape for name, values in rope.items()}
        for key, stored in tensors.items():
            parts = names_in_file(family, key)
            if not parts:
                raise Unreadable(f"llama.cpp's {family.architecture} has no tensor for {key}")
            shape = stored.shape
            part_shape = shape if len(parts) == 1 else (shape[0], shape[1] // len(parts), *shape[2:])
            shapes |= dict.fromkeys(parts, part_shape)
        check_written(family, config, metadata, shapes, rope)
    except Unreadable as reason:
        raise HalfplateError(
            f"format='gguf': {reason}; export it as dense and use llama.cpp's converter, if that knows a way"
        ) from None
    writer = gguf.GGUFWriter(str(path), family.architecture)
    _add_metadata(writer, metadata)
    kinds = {part: stored.kind for key, stored in tensors.items() for part in names_in_file(family, key)}
    writer.add_file_type(_file_type(shapes, kinds))
    if any(kind not in FLOATS for kind in kinds.values()):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, shape in shapes.items():
        _add_info(writer, name, shape, kinds.get(name, "F32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in rope.values():
        writer.write_tensor_data(values)
    # One tensor at a time, so that no second copy of the model is held.
    for key, stored in tensors.items():
        for _, piece in write_values(family, config, key, stored.content()):
            writer.write_tensor_data(piece)
    writer.close()
    return tensors


def _config_as_written(model: Any) -> Any:
    """The configuration of the model; a head of codes that is tied to the embedding counts as tied."""
    head = getattr(model, "lm_head", None)
    if not isinstance(head, CompressedMatrix) or head.spec.same_as is None or model.config.tie_word_embeddings:
        return model.config
    config = deepcopy(model.config)
    config.tie_word_embeddings = True
    return config


def _file_type(shapes: dict[str, tuple[int, ...]], kinds: dict[str, str]) -> Any:
    """The type of most of the weights in matrices. llama.cpp's names for K types end in S if no other type is in the layers, else in M."""
    import gguf

    counts: Counter[str] = Counter()
    for name, kind in kinds.items():
        if len(shapes[name]) > 1:
            counts[kind] += prod(shapes[name])
    most = counts.most_common(1)[0][0]
    if most == "F32":
        return gguf.LlamaFileType.ALL_F32
    alone = {kind for name, kind in kinds.items() if name.startswith("blk.") and len(shapes[name]) > 1} <= {most, "F32"}
    suffix = ("_S" if alone else "_M") if most in ("Q3_K", "Q4_K", "Q5_K") else ""
    return gguf.LlamaFileType[f"MOSTLY_{most}{suffix}"]


def _add_info(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType[kind]
    block, nbytes = GGML_QUANT_SIZES[number]
    rows, row = shape[:-1], shape[-1] // block * nbytes
    dtype = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
    # For bytes, the gguf package computes the shape of the values.
    described = (*rows, row) if dtype is np.uint8 else shape
    writer.add_tensor_info(name, described, np.dtype(dtype), prod(rows) * row, number)


def _add_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":  # written by the gguf package itself
            add = writer.add_array if isinstance(value, list) else kinds[type(value)]
            add(key, value)
