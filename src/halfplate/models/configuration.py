"""`config.json` and `generation_config.json` of a model folder: read, checked, and stripped of entries that do not concern the weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from copy import deepcopy
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError
from halfplate.models.auto import model_class
from halfplate.models.reading import in_words, reading
from halfplate.models.trust import check_layers, read_json_file

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

METHOD = "halfplate"
# These methods quantise plain weights at run time, so the weights alone do not define the model.
QUANTISED_AT_RUN_TIME = ("bitnet",)
# Names of tensors in quantised files (GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8 and MXFP4).
QUANTISED_PARTS = re.compile(
    r"[._](weight_(scale|scale_inv|scale_2|packed|zero_point|g_idx)|(input|activation|[kv])_scale|qweight|qzeros|g_idx|SCB|absmax"
    r"|nested_absmax|quant_map|quant_state\..*|codebooks|proj_(blocks|scales))$"
)
# compressed-tensors wrote the second one before transformers chose one name.
QUANTISED_ENTRIES = ("quantization_config", "compression_config")
MLX_ENTRY = "quantization"
ROTARY_NUMBERS = ("rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor")
PLAIN_ATTENTION = (None, "eager", "sdpa")
PLAIN_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")


def read_entries(name: str, path: Path) -> dict[str, Any]:
    """The unchanged content of `config.json` in the folder `path`; raises HalfplateError if it is missing or not a JSON object."""
    file = path / "config.json"
    if not file.is_file():
        raise HalfplateError(
            f"model={name!r} has no config.json; pass the folder that holds config.json and the weights"
        )
    try:
        entries = read_json_file(file)
    except (OSError, ValueError) as error:
        raise HalfplateError(f"model={name!r}: config.json is not valid JSON ({error}); download it again") from None
    if not isinstance(entries, dict):
        raise HalfplateError(
            f"model={name!r}: config.json holds a {type(entries).__name__}, expected an object; download it again"
        )
    return entries


def quantisation_of(entries: dict[str, Any]) -> str | None:
    """The quantisation method that `config.json` names, or None."""
    stated = next((entries[key] for key in QUANTISED_ENTRIES if entries.get(key)), None)
    if isinstance(entries.get(MLX_ENTRY), dict) and (not stated or "quant_method" not in stated):
        return "mlx"
    if not stated:
        return None
    return str(stated.get("quant_method", "unknown")) if isinstance(stated, dict) else "unknown"


def check_plain(name: str, entries: dict[str, Any], tensors: Iterable[str]) -> None:
    """Raise HalfplateError if the names of `tensors` show quantised weights. An entry of `config.json` alone is not enough."""
    part = next((tensor for tensor in tensors if QUANTISED_PARTS.search(tensor)), None)
    if part is not None:
        raise _already_quantised(name, quantisation_of(entries), f"its files hold {part}")


def _already_quantised(name: str, method: str | None, reason: str) -> HalfplateError:
    return HalfplateError(
        f"model={name!r} is already quantised (quant_method {method or 'unknown'!r}, {reason}); Halfplate reads plain weights and those of GPTQ, AWQ, "
        "compressed-tensors, FP8, MXFP4 and MLX: pass the fp32, bf16 or fp16 model it was made from"
    )


def check_values(name: str, entries: dict[str, Any]) -> None:
    """Raise HalfplateError for values that transformers silently accepts but that give a different or unusable model."""
    for key in QUANTISED_ENTRIES:
        if entries.get(key) and not isinstance(entries[key], dict):
            raise HalfplateError(
                f"model={name!r}: config.json: {key}={entries[key]!r}, expected an object; remove the entry if the weights are plain"
            )
    for key, value in _rotary_numbers(entries):
        if not 0 < value < inf:
            raise HalfplateError(
                f"model={name!r}: config.json: {key}={value!r}, expected a number above 0; correct it or download it again"
            )


def _rotary_numbers(entries: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of the base and the factors of rotary embeddings, including those of each layer type."""
    for key, value in entries.items():
        if key in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            inner = [value, *(part for part in value.values() if isinstance(part, dict))]
            yield from (pair for part in inner for pair in _rotary_numbers(part))
        elif key in ROTARY_NUMBERS and isinstance(value, int | float):
            yield key, value


def check_kind(name: str, entries: dict[str, Any]) -> None:
    """Raise HalfplateError if `config.json` alone shows that the model is compressed or rounded already."""
    method = quantisation_of(entries)
    if method == METHOD:
        raise HalfplateError(
            f"model={name!r} is already compressed by Halfplate; pass the original model it was made from"
        )
    if method in QUANTISED_AT_RUN_TIME:
        raise _already_quantised(name, method, "which rounds weights and activations whenever the model runs")


def read_config(name: str, path: Path, entries: dict[str, Any]) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """The configuration in the folder `path`, ready to build the model on any machine, and notes on changes to it.

    entries: the result of `read_entries`.
    Raises HalfplateError if the configuration class refuses the entries, or is not a causal language model.
    """
    import transformers
    from transformers import AutoConfig

    kind = entries.get("model_type")
    check_layers(name, entries)
    check_values(name, entries)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    # A config is untrusted data, and each model class checks it with its own exceptions.
    except Exception as error:
        if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
            raise HalfplateError(
                f"model={name!r}: config.json cannot be read as {kind!r} ({in_words(error, entries)}); correct it or download it again"
            ) from None
        if entries.get("auto_map"):
            raise HalfplateError(
                f"model={name!r} (model_type {kind!r}) needs Python code of its own (auto_map in config.json), which "
                "Halfplate never runs; pass a model that the transformers library has built in"
            ) from None
        raise HalfplateError(
            f"model={name!r} has model_type {kind!r}, which transformers {transformers.__version__} does not know; "
            "upgrade transformers or pass a model that it has built in"
        ) from None
    with reading(name, "config.json cannot be used", "correct it or download it again", entries):
        check_causal(name, config)
        return config, tuple(_freed(config, entries))


def check_causal(name: str, config: PretrainedConfig) -> None:
    """Raise HalfplateError unless the model is a decoder-only language model, alone or within a multimodal model."""
    known = model_class(config)
    stated = [str(one) for one in getattr(config, "architectures", None) or ()]
    # GPT-2 and other old models are called LMHeadModel. A file that names no architecture gets the one of its model_type.
    named = not stated or any(one.endswith("ForCausalLM") or one == getattr(known, "__name__", None) for one in stated)
    both_ways = any(getattr(one, "is_encoder_decoder", False) for one in (config, config.get_text_config()))
    # Its class also has an encoder's form, which attends to later tokens. Other classes have only one form.
    encoder = getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention")
    if known is not None and named and not both_ways and encoder:
        raise HalfplateError(
            f"model={name!r}: its config.json says is_decoder=false, so {known.__name__} attends to later tokens and is an encoder, not a causal "
            "language model; pass a decoder-only model, or correct is_decoder if it was trained as one"
        )
    if known is None or not named or both_ways:
        raise HalfplateError(
            f"model={name!r} is {', '.join(stated) or config.model_type}, not a causal language model; "
            "expected a decoder-only *ForCausalLM such as LlamaForCausalLM, or a multimodal model with one inside"
        )


def check_saves(name: str, config: PretrainedConfig, entries: dict[str, Any]) -> None:
    """Raise HalfplateError if transformers would refuse to save `config` at the end of the run."""
    what = "transformers does not save this config.json, so no result could be written"
    with tempfile.TemporaryDirectory(prefix="halfplate-") as scratch, reading(name, what, "correct it", entries):
        deepcopy(config).save_pretrained(scratch)


def read_generation_config(name: str, path: Path) -> GenerationConfig | None:
    """`generation_config.json` in the folder `path`, None if there is none; raises HalfplateError if it is invalid."""
    from transformers import GenerationConfig

    if not (path / "generation_config.json").is_file():
        return None
    cure = "correct it, or remove it to use the defaults"
    with reading(name, "generation_config.json cannot be read", cure):
        read_json_file(path / "generation_config.json")
        found: GenerationConfig = GenerationConfig.from_pretrained(path, local_files_only=True)
        found.to_json_string()
        return found


def _freed(config: PretrainedConfig, entries: dict[str, Any]) -> list[str]:
    """Remove from `config`, in place, the entries that only say how to run the model; returns a note on each."""
    notes = []
    attention, experts = config._attn_implementation, config._experts_implementation
    if attention not in PLAIN_ATTENTION:
        config._attn_implementation = None
        notes.append(
            f"config.json: attn_implementation={attention!r} is left out; attention uses torch's implementation"
        )
    if experts not in PLAIN_EXPERTS:
        config._experts_implementation = None
        notes.append(f"config.json: experts_implementation={experts!r} is left out; experts use torch's implementation")
    for key, plain in (("output_attentions", False), ("output_hidden_states", False), ("return_dict", True)):
        stated = entries.get(key)
        if stated is not None and bool(stated) is not plain:
            setattr(config, key, plain)
            notes.append(f"config.json: {key}={stated!r} is left out, because it only sets what a call returns")
    if getattr(config, "rescale_every", 0):
        notes.append(
            f"config.json: rescale_every={config.rescale_every} is set to 0; it only keeps fp16 from overflowing"
        )
        config.rescale_every = 0  # which would divide weights and hidden states between the layers of RWKV
    for key in (*QUANTISED_ENTRIES, MLX_ENTRY):
        if key in vars(config):
            delattr(config, key)
    vocabulary, padding = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if isinstance(vocabulary, int) and isinstance(padding, int) and not 0 <= padding < vocabulary:
        config.pad_token_id = None
        notes.append(
            f"config.json: pad_token_id={padding} is outside the vocabulary of {vocabulary} tokens, and is left out"
        )
    return notes
