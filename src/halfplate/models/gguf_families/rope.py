"""Rotary scaling in both directions: keys and tensors of GGUF, `rope_parameters` of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfplate.models.gguf_families.family import Family
from halfplate.models.gguf_families.keys import Keys, Unreadable, shortest

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FACTORS, LONG, SHORT)
FULL, LOCAL = "full_attention", "sliding_attention"
# Original context of Llama 3.1 and later, and the bands in which wavelengths are stretched.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# llama.cpp uses these values and ignores the keys.
YARN = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
SAME = 1e-5  # relative tolerance; factors are stored in F32
LOCAL_BASE = 10000.0


def read_rope(
    family: Family, keys: Keys, head_dim: int, context: int, tensors: Mapping[str, list[float]]
) -> dict[str, Any]:
    """`rope_parameters` for a file with these keys and rotary tensors; raises Unreadable if transformers cannot express them."""
    base = _positive(f"{keys.prefix}rope.freq_base", keys.take("rope.freq_base", float, LOCAL_BASE))
    for name, factors in tensors.items():
        for value in factors:
            _positive(name, value)
    parameters: dict[str, Any] = {"rope_theta": base, **_partial(family, keys, head_dim)}
    parameters |= _scaling(family, keys, context, base, tensors)
    if family.rope.local is None:
        return parameters
    local = base
    if family.rope.local == "key":
        local = _positive(f"{keys.prefix}rope.freq_base_swa", keys.take("rope.freq_base_swa", float, LOCAL_BASE))
    return {FULL: parameters, LOCAL: {"rope_type": "default", "rope_theta": local}}


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise Unreadable(f"{name} holds {value}, expected a finite number above 0")
    return value


def _partial(family: Family, keys: Keys, head_dim: int) -> dict[str, float]:
    turned = keys.take("rope.dimension_count", int, head_dim)
    if not family.partial:
        if turned != head_dim:
            raise Unreadable(f"{keys.prefix}rope.dimension_count is {turned}, heads have {head_dim} values")
        return {}
    if not 0 < turned <= head_dim:
        raise Unreadable(f"{keys.prefix}rope.dimension_count is {turned}, heads have {head_dim} values")
    share = turned / head_dim
    # transformers rounds the product down.
    return {"partial_rotary_factor": share if int(head_dim * share) == turned else np.nextafter(share, 2.0).item()}


def _scaling(
    family: Family, keys: Keys, context: int, base: float, tensors: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The entries of `rope_parameters` other than the base and the rotated share of a head."""
    kind = keys.take("rope.scaling.type", str, "linear")
    old = keys.take("rope.scale_linear", float, 0.0)
    factor = _positive(f"{keys.prefix}rope.scaling.factor", keys.take("rope.scaling.factor", float, old) or 1.0)
    attention = _positive(f"{keys.prefix}rope.scaling.attn_factor", keys.take("rope.scaling.attn_factor", float, 1.0))
    original = keys.take("rope.scaling.original_context_length", int, context) or context
    for name, value in YARN.items():
        keys.expect(f"rope.scaling.{name}", float, value, f"llama.cpp computes with {value}")
    mixed = keys.take("rope.scaling.yarn_ext_factor", float, -1.0)
    if mixed not in (-1.0, float(kind == "yarn")):
        raise Unreadable(f"{keys.prefix}rope.scaling.yarn_ext_factor is {mixed}, and llama.cpp computes without it")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise Unreadable(f"{keys.prefix}rope.scaling.type is {kind!r}, expected none, linear, yarn or longrope")
    if kind == "none":
        factor = 1.0
    if kind == "yarn":
        if tensors or not family.rope.yarn:
            raise Unreadable(f"{keys.prefix}rope.scaling.type is 'yarn', which is not read together with other scaling")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return yarn if attention == 1 else yarn | {"attention_factor": attention * _magnitude(factor)}
    if FACTORS in tensors and set(tensors[FACTORS]) != {1.0}:
        if factor == 1 and attention == 1 and (found := _llama3(tensors[FACTORS], base, original, context)):
            return found
        return _divided(tensors[FACTORS], tensors[FACTORS], factor, attention, context, context)
    if SHORT in tensors and LONG in tensors:
        return _divided(tensors[SHORT], tensors[LONG], factor, attention, original, context)
    if tensors.keys() - {FACTORS} or kind == "longrope":
        raise Unreadable(f"a longrope scaling needs both {SHORT} and {LONG}")
    if attention != 1:
        raise Unreadable(f"{keys.prefix}rope.scaling.attn_factor is {attention} without a scaling that uses it")
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


def _magnitude(factor: float) -> float:
    """The factor by which YaRN scales cosines and sines."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _divided(
    short: list[float], long: list[float], factor: float, attention: float, original: int, context: int
) -> dict[str, Any]:
    """Arbitrary divisors of the frequencies: longrope, whose two sets may be equal."""
    return {
        "rope_type": "longrope",
        "short_factor": [shortest(value * factor) for value in short],
        "long_factor": [shortest(value * factor) for value in long],
        "attention_factor": attention,
        "factor": max(1.0, context / original),
        "original_max_position_embeddings": original,
    }


def _llama3(factors: list[float], base: float, original: int, context: int) -> dict[str, Any] | None:
    """The parameters of Llama 3 scaling that give these factors; None if no known ones do."""
    wavelengths = 2 * math.pi * base ** (np.arange(len(factors)) / len(factors))
    largest = max(factors)
    for candidate in (original, int(LLAMA3["original_max_position_embeddings"]), context):
        smooth = np.clip((candidate / wavelengths - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=SAME, atol=0):
            return (
                {"rope_type": "llama3", "factor": shortest(largest)}
                | LLAMA3
                | {"original_max_position_embeddings": candidate}
            )
    return None


def write_rope(family: Family, config: Any) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Keys and tensors for the rotary embedding of `config`; raises Unreadable if llama.cpp does not support it."""
    nested = FULL in config.rope_parameters
    layer = FULL if nested else None
    parameters = config.rope_parameters[FULL] if nested else config.rope_parameters
    kind = parameters.get("rope_type", "default")
    size = head_size(config)
    keys: dict[str, Any] = {
        "rope.freq_base": float(parameters["rope_theta"]),
        "rope.dimension_count": int(size * (parameters.get("partial_rotary_factor") or 1.0)),
    }
    tensors: dict[str, NDArray[Any]] = {}
    if family.rope.local == "key":
        keys["rope.freq_base_swa"] = float(config.rope_parameters[LOCAL]["rope_theta"])
    original = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    if kind == "default":
        return keys, tensors
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}, tensors
    frequencies, attention = spectrum(config, layer, long=False)
    longer = spectrum(config, layer, long=True)[0]
    plain = _plain(parameters, config)
    standard = all(parameters.get(name) in (None, YARN[f"yarn_{name}"]) for name in ("beta_fast", "beta_slow"))
    if kind == "yarn" and family.rope.yarn and standard and parameters.get("truncate", True):
        factor = float(parameters.get("factor") or config.max_position_embeddings / original)
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": original,
        }
        scale = attention / _magnitude(factor)
        return keys if math.isclose(scale, 1) else keys | {"rope.scaling.attn_factor": scale}, tensors
    if kind == "longrope" and family.rope.longrope:
        tensors = {LONG: plain / longer, SHORT: plain / frequencies}
        keys |= {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": original}
    elif kind != "dynamic" and family.rope.factors and np.array_equal(frequencies, longer):
        tensors = {FACTORS: plain / frequencies}
        if kind == "llama3":
            keys["rope.scaling.original_context_length"] = original
    else:
        raise Unreadable(
            f"llama.cpp's {family.architecture} has no rotary scaling of type {kind!r} with these parameters"
        )
    if attention != 1:
        keys["rope.scaling.attn_factor"] = float(attention)
    return keys, {name: values.astype(np.float32) for name, values in tensors.items()}


def head_size(config: Any) -> int:
    """Number of values in a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _plain(parameters: Mapping[str, Any], config: Any) -> NDArray[np.float64]:
    turned = int(head_size(config) * (parameters.get("partial_rotary_factor") or 1.0))
    powers: NDArray[np.float64] = float(parameters["rope_theta"]) ** (-np.arange(0, turned, 2) / turned)
    return powers


def spectrum(config: Any, layer: str | None, long: bool) -> tuple[NDArray[np.float64], float]:
    """Frequencies and the scale of cosines and sines, as transformers computes them. long: for text beyond the original context."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters[layer] if layer else config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return _plain(parameters, config), 1.0
    length = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings) + 1
    options = {"layer_type": layer} if layer else {}
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](deepcopy(config), "cpu", seq_len=length if long else None, **options)
    return frequencies.double().numpy(), float(scale)


def same_rope(first: Any, second: Any, layers: list[str | None]) -> bool:
    """Whether two configurations have the same rotary embedding in layers of these types."""
    for layer in layers:
        for long in (False, True):
            ours, theirs = spectrum(first, layer, long), spectrum(second, layer, long)
            if ours[0].shape != theirs[0].shape or not np.allclose(ours[0], theirs[0], rtol=2 * SAME, atol=0):
                return False
            if not math.isclose(ours[1], theirs[1], rel_tol=SAME):
                return False
    return True
