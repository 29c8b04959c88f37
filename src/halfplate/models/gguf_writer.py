"""Writing a full-size model as a GGUF file for llama.cpp, with its tokenizer, through the `gguf` package."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfplate.errors import HalfplateError
from halfplate.models.gguf_families.configs import check_written, write_metadata
from halfplate.models.gguf_families.family import Family
from halfplate.models.gguf_families.keys import Unreadable
from halfplate.models.gguf_families.table import family_of_model
from halfplate.models.gguf_families.tensors import Values, names_in_file, write_values
from halfplate.models.gguf_tokenizer_writer import add_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_gguf(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", path: Path, half: bool = True
) -> None:
    """Write matrices as F16 (half) or F32, and norms, biases and routers as F32. Without a tokenizer, the file only knows token ids.

    Raises HalfplateError for an unsupported architecture, for settings that llama.cpp does not support, for a tokenizer that
    cannot be written, and for weights beyond the range of F16.
    """
    import gguf

    config: Any = model.config
    family = family_of_model(config.model_type)
    state = _state(model, family)
    try:
        metadata, rope = write_metadata(family, config)
        shapes: dict[str, tuple[int, ...]] = {name: values.shape for name, values in rope.items()}
        for key, tensor in state.items():
            parts = names_in_file(family, key)
            if not parts:
                raise Unreadable(f"llama.cpp's {family.architecture} has no tensor for {key}")
            shape = tuple(tensor.shape)
            part_shape = shape if len(parts) == 1 else (shape[0], shape[1] // len(parts), *shape[2:])
            shapes |= dict.fromkeys(parts, part_shape)
        check_written(family, config, metadata, shapes, rope)
    except Unreadable as reason:
        raise HalfplateError(
            f"format='gguf': {reason}; export it as dense and use llama.cpp's converter, if that knows a way"
        ) from None
    writer = gguf.GGUFWriter(str(path), family.architecture)
    _add_metadata(writer, metadata)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, shape in shapes.items():
        kind = np.dtype(np.float16 if half and _is_matrix(name, shape) else np.float32)
        writer.add_tensor_info(name, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in rope.values():
        writer.write_tensor_data(values)
    # One tensor at a time, so that no second copy of the model is held.
    for key, tensor in state.items():
        for name, piece in write_values(family, config, key, tensor.detach().float().cpu().numpy()):
            writer.write_tensor_data(_half(key, piece) if half and _is_matrix(name, piece.shape) else piece)
    writer.close()


def _state(model: Any, family: Family) -> dict[str, Any]:
    """The tensors to write. A shared tensor is written once, except for a head that llama.cpp needs as a separate tensor."""
    tied = set(model.all_tied_weights_keys or {})
    if family.head == "own":
        tied.discard("lm_head.weight")
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def _add_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":  # written by the gguf package itself
            add = writer.add_array if isinstance(value, list) else kinds[type(value)]
            add(key, value)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is written in half precision: matrices of products, but not routers, which are small and sensitive."""
    return len(shape) > 1 and "ffn_gate_inp" not in name


def _half(key: str, values: Values) -> Any:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise HalfplateError(f"format='gguf': {key} holds values beyond the range of F16; export it as dense")
    return half
