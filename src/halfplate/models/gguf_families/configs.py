"""Converting configurations between GGUF metadata and transformers, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halfplate.models.gguf_families.family import REQUIRED, Family
from halfplate.models.gguf_families.keys import Keys, Unreadable, shortest
from halfplate.models.gguf_families.rope import FULL, LOCAL, ROPE_TENSORS, head_size, read_rope, same_rope, write_rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# Fields that do not affect inference, or that repeat another field.
IDLE = frozenset(
    (
        "_name_or_path",
        "_sliding_window_pattern",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "no_rope_layer_interval",
        "original_max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "partial_rotary_factor",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sliding_window_pattern",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_sliding_window",
    )
)
DROPOUT = ("dropout", "_pdrop")


@dataclass(frozen=True)
class Contents:
    """The content of a GGUF file: metadata (without the arrays of the tokenizer), shapes of its tensors (rows first), and values of rotary tensors."""

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    rope: Mapping[str, list[float]]


def read_config(family: Family, contents: Contents, model_type: str | None = None) -> PretrainedConfig:
    """The configuration that a file describes. Raises Unreadable for a key without a counterpart.

    model_type: of transformers, if not that of the family.
    """
    from transformers import AutoConfig

    keys = Keys(contents.metadata, family.architecture)
    fields = _sizes(keys, contents)
    fields |= _head(family, keys, fields)
    eps_key, eps_field = family.eps
    fields[eps_field] = keys.take(eps_key, float)
    for setting in family.settings:
        fields[setting.field] = keys.take(setting.key, setting.kind, setting.default)
    if "attention_multiplier" in fields and not fields["attention_multiplier"]:
        fields["attention_multiplier"] = (fields["hidden_size"] // fields["num_attention_heads"]) ** -0.5
    fields |= _windows(family, keys, fields)
    present = {name.split(".", 2)[2] for name in contents.shapes if name.startswith("blk.")}
    for name, tensors in family.flags.items():
        fields[name] = any((one.lstrip("!") in present) != one.startswith("!") for one in tensors)
    fields["tie_word_embeddings"] = "output.weight" not in contents.shapes
    size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    fields["rope_parameters"] = read_rope(family, keys, size, fields["max_position_embeddings"], contents.rope)
    if "original_max_position_embeddings" in fields["rope_parameters"]:
        original = fields["rope_parameters"]["original_max_position_embeddings"]
        fields["original_max_position_embeddings"] = original
    for name, value in family.fixed.items():
        fields[name] = value(fields) if callable(value) else value
    keys.expect("attention.causal", bool, True, "only causal models are read")
    if family.architecture == "granite":
        keys.expect("rope.scaling.finetuned", bool, True, "llama.cpp does not rotate such a model")
    keys.list("rope.scaling.finetuned")
    for name in (*family.ignored, "tensor_data_layout", *_idle_counts(keys)):
        keys.list(name)
    keys.check_all_taken()
    for field, token in TOKENS.items():
        number = contents.metadata.get(f"tokenizer.ggml.{token}")
        fields[field] = number if type(number) is int and 0 <= number < fields["vocab_size"] else None
    config: PretrainedConfig = AutoConfig.for_model(model_type or family.model_type, **fields)
    return config


def _idle_counts(keys: Keys) -> list[str]:
    """Counts of optional parts of a model, which must be zero."""
    names = ("expert_count", "expert_used_count", "nextn_predict_layers", "attention.sliding_window", "pooling_type")
    return [name for name in names if keys.metadata.get(keys.prefix + name) == 0]


def _sizes(keys: Keys, contents: Contents) -> dict[str, Any]:
    fields = {
        field: keys.take(key, int)
        for key, field in (
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("block_count", "num_hidden_layers"),
            ("feed_forward_length", "intermediate_size"),
            ("attention.head_count", "num_attention_heads"),
        )
    }
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = keys.take("attention.head_count_kv", int, heads)
    embedding = contents.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise Unreadable("the tensor token_embd.weight is missing or not a matrix")
    fields["vocab_size"] = embedding[0]
    keys.expect("vocab_size", int, embedding[0], f"token_embd.weight has {embedding[0]} rows")
    for field, value in fields.items():
        most = len(contents.shapes) if field == "num_hidden_layers" else max(sum(embedding), 2**20)
        if not 0 < value <= most and field != "max_position_embeddings":
            raise Unreadable(f"{field} is {value}, expected 1 to {most}")
    return fields


def _head(family: Family, keys: Keys, fields: Mapping[str, Any]) -> dict[str, int]:
    """The head size, if the configuration has a field for it."""
    usual = fields["hidden_size"] // fields["num_attention_heads"]
    size = keys.take("attention.key_length", int, usual)
    values = keys.take("attention.value_length", int, usual)
    for name, full in (("attention.key_length_swa", size), ("attention.value_length_swa", values)):
        keys.expect(name, int, full, f"other layers have {full}")
    if size != values or size <= 0:
        raise Unreadable(f"heads have {size} values in keys and {values} in values, expected equal sizes")
    if (not family.head_dim or family.square) and size != usual:
        raise Unreadable(f"heads have {size} values, {family.architecture} has {usual}")
    return {"head_dim": size} if family.head_dim else {}


def _windows(family: Family, keys: Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window, and which layers have it."""
    layers = fields["num_hidden_layers"]
    if family.unused_window:
        return {"sliding_window": keys.take("attention.sliding_window", int, 0) or None}
    if not family.period:
        return {}
    window = keys.take("attention.sliding_window", int, family.window_default) or 0
    pattern = keys.list("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != layers or any(one not in (0, 1) for one in pattern):
            raise Unreadable(
                f"attention.sliding_window_pattern has {len(pattern)} entries, expected {layers} of 0 and 1"
            )
        sliding = [bool(one) for one in pattern]
    else:
        period = keys.take("attention.sliding_window_pattern", int, family.period)
        sliding = [period == 0 or layer % period < period - 1 for layer in range(layers)]
    if not window:
        if family.window_default is not None:
            raise Unreadable("attention.sliding_window is 0")
        sliding = [False] * layers
    kinds = [LOCAL if one else FULL for one in sliding]
    return {"layer_types": kinds} | ({"sliding_window": window} if window else {})


def write_metadata(family: Family, config: Any) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Metadata (without the tokenizer) and rotary tensors of a file for a model of `config`.

    Raises Unreadable for settings that llama.cpp does not support.
    """
    size = head_size(config)
    if family.square and size * config.num_attention_heads != config.hidden_size:
        raise Unreadable(
            f"llama.cpp's {family.architecture} has heads of {config.hidden_size // config.num_attention_heads} values, the model of {size}"
        )
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        family.eps[0]: float(getattr(config, family.eps[1])),
        "vocab_size": config.vocab_size,
    }
    for setting in family.settings:
        value = getattr(config, setting.field)
        if value is not None:
            keys[setting.key] = setting.kind(value)
    kinds = getattr(config, "layer_types", None) or []
    if family.unused_window:
        keys["attention.sliding_window"] = 0
    elif family.period and LOCAL in kinds:
        keys["attention.sliding_window"] = config.sliding_window
        keys["attention.sliding_window_pattern"] = [kind == LOCAL for kind in kinds]
    rope, tensors = write_rope(family, config)
    metadata = {f"{family.architecture}.{name}": value for name, value in (keys | rope).items()}
    return {"general.architecture": family.architecture} | metadata, tensors


def check_written(
    family: Family,
    config: Any,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope: Mapping[str, Any],
) -> None:
    """Raise Unreadable, naming the field, if llama.cpp would compute with this content something else than `config` says."""
    stored = {name: shortest(value) if isinstance(value, float) else value for name, value in metadata.items()}
    contents = Contents(stored, shapes, {name: values.tolist() for name, values in rope.items()})
    read = read_config(family, contents, config.model_type)
    ours, theirs = _comparable(family, config), _comparable(family, read)
    for field in sorted(ours.keys() | theirs.keys()):
        wanted, found = ours.get(field), theirs.get(field)
        if not _equal(wanted, found):
            raise Unreadable(
                f"llama.cpp's {family.architecture} computes with {field}={found!r}, the model has {wanted!r}"
            )
    nested = FULL in config.rope_parameters
    layers: list[str | None] = sorted(set(config.layer_types)) if nested else [None]
    if not same_rope(config, read, layers):
        raise Unreadable(
            f"llama.cpp's {family.architecture} cannot apply the rotary embedding rope_parameters={config.rope_parameters!r}"
        )


def _comparable(family: Family, config: Any) -> dict[str, Any]:
    """The fields that matter, normalised so that equal meanings have equal values."""
    fields = config.to_dict()
    fields["head_dim"] = head_size(config)
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    kinds, window = fields.get("layer_types"), fields.get("sliding_window")
    if LOCAL not in kinds if kinds else window and window >= fields["max_position_embeddings"]:
        fields["sliding_window"] = None
    if family.head == "own":  # a tied head is written twice
        fields.pop("tie_word_embeddings", None)
    return {name: value for name, value in fields.items() if name not in IDLE and not name.endswith(DROPOUT)}


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=1e-6)
    return bool(first == second) or (first in (None, False) and second in (None, False))


__all__ = ["REQUIRED", "ROPE_TENSORS", "Contents", "check_written", "read_config", "write_metadata"]
