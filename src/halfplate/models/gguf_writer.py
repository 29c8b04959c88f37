"""A dense model as a GGUF file that llama.cpp runs, tokenizer included, through the `gguf` package."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names of llama.cpp. Its Llama turns neighbours of a head in the rotary embedding, transformers its halves.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# How a byte-level vocabulary cuts text before it merges, by what is particular of each in tokenizer.json (`tokenizer.ggml.pre`).
LLAMA3_SPLIT = r"\p{N}{1,3}"
QWEN2_SPLIT = r"|\p{N}|"


def write_gguf(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", path: Path) -> None:
    """Write matrices as F16, norms and biases as F32. Without a tokenizer, the file knows token ids alone.

    Raises HalfplateError for an architecture, a rotary embedding or a tokenizer that is not written here, and for weights
    beyond the range of F16.
    """
    import gguf

    name = ARCHITECTURES.get(type(model).__name__)
    if name is None:
        raise HalfplateError(
            f"format='gguf': {type(model).__name__} is not one of {', '.join(ARCHITECTURES)}; export it as dense and use llama.cpp's converter"
        )
    writer = gguf.GGUFWriter(str(path), name)
    _add_settings(writer, model.config, name)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], model.config.num_hidden_layers)
    tied = model.all_tied_weights_keys
    for key, tensor in model.state_dict().items():
        if key not in tied:
            written = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if written is None:
                raise HalfplateError(f"format='gguf': {key} has no name in llama.cpp's {name}; export it as dense")
            writer.add_tensor(written, _values(key, tensor, model.config, name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: Any, config: Any, name: str) -> None:
    import gguf

    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope.get("rope_type", "default") != "default":
        raise HalfplateError(
            f"format='gguf': rotary embeddings of type {rope['rope_type']!r} are not written; export it as dense and use llama.cpp's converter"
        )
    # Mistral has a window in every layer where it has one, and lists no kinds of layers.
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    everywhere = kinds is None and window is not None and window < config.max_position_embeddings
    if everywhere or "sliding_attention" in (kinds or ()):
        raise HalfplateError(
            "format='gguf': attention in a sliding window is not written; export it as dense and use llama.cpp's converter"
        )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if name == "llama":
        writer.add_rope_dimension_count(head_dim)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _values(key: str, tensor: Tensor, config: Any, name: str) -> Any:
    """The tensor as llama.cpp wants it: rows of q and k of a Llama in another order, F16 where it is a matrix."""
    if name == "llama":
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{projection}." in key:
                tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    values = tensor.detach().float().cpu().numpy()
    if values.ndim == 1:
        return values
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
