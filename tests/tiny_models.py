"""Tiny random models of every architecture of the installed transformers: their configurations are shrunk by the names of their entries."""

from __future__ import annotations

import re
from typing import Any

from tiny_traits import DIFFERENT, LAYERS, SIZES, SPECIAL_TOKENS

LARGE = re.compile(r"(_size|_dim|_dims|_rank|_channels|_width|_length|_positions|_hidden)$|^(dim|width|channels)$")
MOST = 64  # of a number whose name says a size and that no table names
COUNTS = re.compile(r"(_experts|_routed_experts|experts)$|^(num|n)_(?!.*(layers|positions|per)).*(heads|experts)")
LARGEST = 20_000_000  # values of a model that counts as tiny
FIRST_SPECIAL = 300  # token of an image, an audio frame and so on


def text_models() -> list[str]:
    """The model types that AutoModelForCausalLM builds, decoders of other kinds of models included."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def wrappers() -> list[str]:
    """The model types that AutoModelForMultimodalLM builds and whose language model is part of them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, wrapper: bool = False) -> Any:
    """The configuration of a tiny model of model type `kind`."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    return made(**tiny_entries(made, DIFFERENT.get(kind, {})))


def tiny_entries(made: Any, different: dict[str, Any]) -> dict[str, Any]:
    """Entries of a configuration of the class `made`. different: entries that no table gives, those of parts as dictionaries."""
    entries = _shrunk(made().to_dict())
    given = {key: value for key, value in different.items() if not isinstance(value, dict)}
    parts = dict(getattr(made, "sub_configs", {}))
    for key, part in parts.items():
        inner = different.get(key, {})
        if inner is None or (entries.get(key) is None and key not in different):
            continue
        kind = (entries.get(key) or {}).get("model_type") or inner.get("model_type")
        entries[key] = _part(part, kind, inner)
    entries |= given
    if isinstance(entries.get("rope_parameters"), dict):
        entries["rope_parameters"] = _rotary(entries["rope_parameters"], entries)
    entries |= {key: value for key, value in different.items() if isinstance(value, dict) and key not in parts}
    return {key: value for key, value in entries.items() if value is not Ellipsis}


def _part(part: Any, kind: str | None, different: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    if kind is not None and kind in CONFIG_MAPPING:
        part = CONFIG_MAPPING[kind]
    found = tiny_entries(part, different)
    return found if kind is None else found | {"model_type": kind}


def _shrunk(entries: dict[str, Any]) -> dict[str, Any]:
    """`entries` of a configuration with small numbers."""
    layers = next((entries[key] for key in LAYERS if isinstance(entries.get(key), int)), None)
    count = _layers(entries, layers)
    special = iter(range(FIRST_SPECIAL, FIRST_SPECIAL + 100))
    small = {key: _small(key, value, layers, count, special) for key, value in entries.items() if key not in DROPPED}
    if isinstance(entries.get("kv_lora_rank"), int):
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


GIVEN = ("head_dim", "num_key_value_heads")  # tiny models have them even if they are not given by default
DROPPED = (
    "transformers_version",
    "id2label",
    "label2id",
    "_name_or_path",
    "architectures",
    "per_layer_config",
    "model_type",
)


def _rotary(rope: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters with sections for time, height and width that fill the heads of these sizes."""
    if "mrope_section" not in rope or entries.get("head_dim") is None:
        return rope
    head = (
        entries.get("qk_rope_head_dim")
        or entries.get("head_dim")
        or SIZES["hidden_size"] // SIZES["num_attention_heads"]
    )
    half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    return rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def _layers(entries: dict[str, Any], layers: int | None) -> int:
    """Layers of the tiny model: enough for one of each kind."""
    kinds = [
        len({str(one) for one in value})
        for value in entries.values()
        if isinstance(value, list) and layers and len(value) == layers
    ]
    most = max(kinds, default=1)
    return 4 if most > 1 else 3 if most > 2 else 2 if most < 3 else most


def _small(key: str, value: Any, layers: int | None, count: int, special: Any) -> Any:
    if key in LAYERS and isinstance(value, int):
        return count
    if key in SIZES:
        return None if value is None and key not in GIVEN else SIZES[key]
    if key in SPECIAL_TOKENS:
        return SPECIAL_TOKENS[key]
    if re.search(r"_token_(id|index)$", key) and isinstance(value, int):
        return next(special)
    if isinstance(value, list) and layers and len(value) == layers:
        kinds = list(dict.fromkeys(map(str, value)))
        by_name = {str(one): one for one in value}
        return [by_name[kinds[at % len(kinds)]] for at in range(count)]
    if isinstance(value, int) and not isinstance(value, bool):
        if COUNTS.search(key):
            return min(value, 4)
        if LARGE.search(key):
            return min(value, MOST)
    return value


def few_layers(entries: dict[str, Any]) -> dict[str, Any]:
    """`entries` of a configuration with as few layers as a tiny model has, and all other sizes as they are."""
    layers = next((entries[key] for key in LAYERS if isinstance(entries.get(key), int)), None)
    count = _layers(entries, layers)
    return {
        key: _small(key, value, layers, count, None) if key in LAYERS or isinstance(value, list) else value
        for key, value in entries.items()
        if key not in DROPPED
    }


def build_model(kind: str, wrapper: bool = False, seed: int = 0) -> Any:
    """A tiny model with seeded random weights, norms and biases included, in fp32 and eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    auto: Any = AutoModelForMultimodalLM if wrapper else AutoModelForCausalLM
    config = tiny_config(kind)
    with torch.device("meta"):
        values = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if values > LARGEST:
        raise ValueError(f"{values} values with the entries of tiny_traits.py")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
