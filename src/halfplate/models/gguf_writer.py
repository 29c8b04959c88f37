"""A dense model as a GGUF file that llama.cpp runs, tokenizer included, through the `gguf` package."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfplate.errors import HalfplateError
from halfplate.models.gguf_families.configs import check_written, write_metadata
from halfplate.models.gguf_families.family import Family
from halfplate.models.gguf_families.keys import Unreadable
from halfplate.models.gguf_families.table import family_of_model
from halfplate.models.gguf_families.tensors import Values, names_in_file, write_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How a byte-level vocabulary cuts text before it merges, by what is particular of each in tokenizer.json (`tokenizer.ggml.pre`).
LLAMA3_SPLIT = r"\p{N}{1,3}"
QWEN2_SPLIT = r"|\p{N}|"


def write_gguf(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", path: Path, half: bool = True
) -> None:
    """Write matrices as F16 (half) or F32, norms, biases and routers as F32. Without a tokenizer, the file knows token ids alone.

    Raises HalfplateError for an architecture that is not in the table, for what llama.cpp does not compute, for a tokenizer that
    is not written here, and for weights beyond the range of F16.
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
        _add_tokenizer(writer, tokenizer, config.vocab_size)
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
    """The tensors to write: each that is shared once, but for a head that llama.cpp wants as a tensor of its own."""
    tied = set(model.all_tied_weights_keys or {})
    if family.head == "own":
        tied.discard("lm_head.weight")
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def _add_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer's own
            add = writer.add_array if isinstance(value, list) else kinds[type(value)]
            add(key, value)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp multiplies by it; routers, which are small and decide, stay whole."""
    return len(shape) > 1 and "ffn_gate_inp" not in name


def _half(key: str, values: Values) -> Any:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise HalfplateError(f"format='gguf': {key} holds values beyond the range of F16; export it as dense")
    return half


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """The vocabulary, its merges or scores, and the tokens with a meaning of their own."""
    from gguf import TokenType

    if not tokenizer.is_fast:
        raise HalfplateError("format='gguf': the tokenizer has no tokenizer.json; save its fast form beside the model")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise HalfplateError(f"format='gguf': a tokenizer of type {model['type']} is not written; export it as dense")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for text, number in tokenizer.get_vocab().items():
        if number >= vocab_size:
            raise HalfplateError(
                f"format='gguf': the tokenizer has {text!r} at {number}, the model {vocab_size} embeddings; give it the tokenizer it was trained with, or export it as dense"
            )
        tokens[number], kinds[number] = text, TokenType.NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if model.get("byte_fallback"):
        _add_sentence_pieces(writer, tokenizer, tokens, kinds, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(described["pre_tokenizer"]))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_sentence_pieces(writer: Any, tokenizer: Any, tokens: list[str], kinds: list[Any], merges: list[str]) -> None:
    """llama.cpp merges the pair whose union has the highest score: what is merged first must score most."""
    from gguf import TokenType

    scores = dict.fromkeys(tokens, -1e6)
    for rank, pair in reversed(list(enumerate(merges))):
        scores[pair.replace(" ", "")] = -float(rank)
    for number, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x"):
            kinds[number] = TokenType.BYTE
        elif number == tokenizer.unk_token_id:
            kinds[number] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([scores[text] for text in tokens])
    writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))


def _splitting(described: Any) -> str:
    """llama.cpp's name for how a byte-level vocabulary cuts text; raises HalfplateError where that is not known."""
    steps = described["pretokenizers"] if described and described["type"] == "Sequence" else [described]
    kinds = [step["type"] if step else None for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(steps[0]["pattern"].get("Regex"))
        for mark, name in ((LLAMA3_SPLIT, "llama-bpe"), (QWEN2_SPLIT, "qwen2")):
            if mark in pattern:
                return name
    raise HalfplateError(
        f"format='gguf': a vocabulary split by {', '.join(map(str, kinds))} is not known to be one of llama.cpp's; export it as dense and use llama.cpp's converter"
    )
