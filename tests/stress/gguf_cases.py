"""Tiny models with weights from a fixed seed, one or more for each family of GGUF files, and the text that they are checked on."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LENGTH = 48  # tokens of the text: longer than the windows and than the original contexts below
KEPT = (0, 15, 31, LENGTH - 1)  # positions whose logits are stored
WINDOW = {"sliding_window": 11}


@dataclass(frozen=True)
class Case:
    """A model of transformers' `model_type`: what differs from SIZES."""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


HEADS = {"head_dim": 16}
WIDE = {"head_dim": 32}  # heads wider together than the model
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONG = _rope(
    "longrope",
    factor=4.0,
    original_max_position_embeddings=32,
    short_factor=[1.0 + 0.1 * step for step in range(8)],
    long_factor=[1.5 + 0.5 * step for step in range(8)],
)
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

CASES = (
    Case("llama", "llama", HEADS),
    Case("llama, wide heads, tied head", "llama", {**WIDE, "tie_word_embeddings": True}),
    Case("llama, biases", "llama", {**HEADS, "attention_bias": True, "mlp_bias": True}),
    Case("llama, linear", "llama", {**HEADS, **_rope("linear", factor=4.0)}),
    Case("llama, yarn", "llama", {**HEADS, **YARN}),
    Case(
        "llama, yarn, attention factor",
        "llama",
        {**HEADS, **_rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3)},
    ),
    Case(
        "llama, yarn, other bands",
        "llama",
        {**HEADS, **_rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5)},
    ),
    Case("llama, llama3", "llama", {**HEADS, **LLAMA3}),
    Case("llama, longrope, long", "llama", {**HEADS, **LONG}),
    Case("mistral", "mistral", {**HEADS, "sliding_window": None}),
    Case("mixtral", "mixtral", {**HEADS, **EXPERTS}),
    Case("qwen2", "qwen2"),
    Case("qwen2, yarn", "qwen2", YARN),
    Case("qwen3", "qwen3", WIDE),
    Case("qwen3moe", "qwen3_moe", {**WIDE, **EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    Case("gemma", "gemma", WIDE),
    Case("gemma2", "gemma2", {**WIDE, **WINDOW, "query_pre_attn_scalar": 32, "num_hidden_layers": 4}),
    Case(
        "gemma3",
        "gemma3_text",
        {
            **WIDE,
            **WINDOW,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    Case(
        "gemma3, soft cap, own pattern",
        "gemma3_text",
        {
            **WIDE,
            **WINDOW,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 4,
            "layer_types": MIXED,
            "final_logit_softcapping": 5.0,
        },
    ),
    Case("phi3", "phi3"),
    Case("phi3, longrope, long", "phi3", {**LONG, "original_max_position_embeddings": 32}),
    # llama.cpp chooses by the room for tokens, which it makes in steps of 256.
    Case(
        "phi3, longrope, short",
        "phi3",
        {**LONG, "original_max_position_embeddings": 256, "max_position_embeddings": 1024},
    ),
    Case(
        "granite",
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
    ),
    Case("smollm3", "smollm3", {"num_hidden_layers": 5}),
    Case("olmo2", "olmo2"),
    Case("olmo3", "olmo3", {**WINDOW, "num_hidden_layers": 4}),
    Case("starcoder2", "starcoder2", {"sliding_window": None}),
    Case("stablelm", "stablelm", {"use_qkv_bias": True}),
    Case("stablelm, parallel", "stablelm", {"use_parallel_residual": True}),
    Case(
        "phi2",
        "phi",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    Case("exaone", "exaone", HEADS),
    Case("exaone, llama3", "exaone", {**HEADS, **LLAMA3}),
    Case("command-r", "cohere", {"logit_scale": 0.25}),
    Case("cohere2", "cohere2", {**WINDOW, "num_hidden_layers": 4, "logit_scale": 0.25}),
    Case("ernie4_5", "ernie4_5", HEADS),
    Case("glm4", "glm4", HEADS),
    Case("nemotron", "nemotron", {**HEADS, "attention_bias": True, "mlp_bias": True}),
    Case("arcee", "arcee", HEADS),
    Case("seed_oss", "seed_oss", WIDE),
    Case("olmoe", "olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
)


def build(case: Case) -> Any:
    """The model of a case in fp32; its weights are numpy's, equal on every machine."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.model_type, **deepcopy(SIZES | case.settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    numbers = np.random.default_rng(16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(numbers.standard_normal(parameter.shape, dtype=np.float32))
            center = 1.0 if name.endswith("norm.weight") and parameter.mean() > 0.5 else 0.0
            parameter.copy_(center + (0.1 if parameter.ndim == 1 else 0.15) * values)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def text() -> list[int]:
    """Token ids, the same for every case."""
    return [1, *(int(number) for number in np.random.default_rng(7).integers(3, 64, LENGTH - 1))]


def logits(model: Any) -> np.ndarray[Any, Any]:
    """Of transformers, (LENGTH, vocabulary)."""
    with torch.no_grad():
        out: np.ndarray[Any, Any] = model(input_ids=torch.tensor([text()]), use_cache=False).logits[0].numpy()
    return out


def digest(path: Path) -> str:
    """What a file says to llama.cpp: SHA-256 over the metadata, names, shapes and values of a GGUF file in an order of its own.

    Rotary factors are computed and count with four digits.
    """
    from halfplate.models.gguf_header import check_header

    contents, data, total = check_header(path), path.read_bytes(), hashlib.sha256()
    for key in sorted(contents.metadata):
        total.update(f"{key}={contents.metadata[key]!r};".encode())
    for name in sorted(contents.entries):
        entry = contents.entries[name]
        content = data[entry.start : entry.start + entry.nbytes]
        if name.startswith("rope_"):
            content = " ".join(f"{value:.3e}" for value in np.frombuffer(content, np.float32)).encode()
        total.update(f"{name} {entry.shape} {entry.kind};".encode() + content)
    return total.hexdigest()
