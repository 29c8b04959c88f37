"""The model families that are checked against llama.cpp in both directions (tests/stress/gguf_check.py). No others are read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from halfplate.errors import HalfplateError
from halfplate.models.gguf_families.family import (
    ATTENTION,
    EXPERTS,
    GEMMA2,
    LLAMA,
    MLP,
    OUTER,
    QK_NORM,
    REQUIRED,
    Family,
    Rope,
    Setting,
)

LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")
ATTENTION_BIAS = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
MLP_BIAS = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
NO_WINDOW = {"sliding_window": None}
NO_WINDOWS = {"use_sliding_window": False, "sliding_window": None}
GELU = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": None}


def _gemma_scale(layers_of_27b: int) -> Any:
    """The attention scale of Gemma; llama.cpp recognises the 27B model, which differs, by its number of layers."""

    def scalar(fields: Mapping[str, Any]) -> int:
        large = fields["num_hidden_layers"] == layers_of_27b
        return int(fields["hidden_size"] // fields["num_attention_heads"] if large else fields["head_dim"])

    return scalar


_LLAMA = Family(
    "llama",
    "llama",
    flags={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
    fixed={"hidden_act": "silu"},
    rope=Rope(factors=True, longrope=True),
    turned=True,
    head_dim=True,
)
_MISTRAL = replace(_LLAMA, model_type="mistral", flags={}, fixed={"hidden_act": "silu", **NO_WINDOW}, imported=False)
_QWEN3_BLOCK = {**LLAMA, **QK_NORM}
_EXPERT_COUNTS = (
    Setting("expert_count", "num_local_experts", int),
    Setting("expert_used_count", "num_experts_per_tok", int),
)
_OLMO2_BLOCK = {
    **{name: theirs for name, theirs in ATTENTION.items() if name != "input_layernorm"},
    **QK_NORM,
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **MLP,
}
_OLMO2 = Family(
    "olmo2",
    "olmo2",
    block=_OLMO2_BLOCK,
    fixed={"hidden_act": "silu", "attention_bias": False},
    square=True,
    head="own",
)
_COHERE_BLOCK = {**ATTENTION, **MLP}

# A family with a marker comes before the family of the remaining files of its architecture.
FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "mixtral",
        block={**ATTENTION, "post_attention_layernorm": "ffn_norm", **EXPERTS},
        settings=_EXPERT_COUNTS,
        fixed={"hidden_act": "silu", **NO_WINDOW},
        rope=Rope(factors=True, longrope=True),
        turned=True,
        head_dim=True,
        marker="expert_count",
    ),
    _LLAMA,
    _MISTRAL,
    Family("qwen2", "qwen2", fixed={"hidden_act": "silu", **NO_WINDOWS}, square=True),
    Family(
        "qwen3",
        "qwen3",
        block=_QWEN3_BLOCK,
        fixed={"hidden_act": "silu", "attention_bias": False, **NO_WINDOWS},
        head_dim=True,
    ),
    Family(
        "qwen3moe",
        "qwen3_moe",
        block={**ATTENTION, **QK_NORM, "post_attention_layernorm": "ffn_norm", **EXPERTS},
        settings=(*_EXPERT_COUNTS, Setting("expert_feed_forward_length", "moe_intermediate_size", int)),
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            **NO_WINDOWS,
        },
        head_dim=True,
    ),
    Family(
        "gemma",
        "gemma",
        fixed={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": None},
        offset=1.0,
        head_dim=True,
        head="tied",
    ),
    Family(
        "gemma2",
        "gemma2",
        block=GEMMA2,
        settings=(
            Setting("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
            Setting("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
        ),
        fixed={**GELU, "query_pre_attn_scalar": _gemma_scale(46)},
        offset=1.0,
        head_dim=True,
        head="tied",
        period=2,
        window_default=4096,
    ),
    Family(
        "gemma3",
        "gemma3_text",
        block={**GEMMA2, **QK_NORM},
        settings=(Setting("final_logit_softcapping", "final_logit_softcapping", float, None),),
        fixed={
            **GELU,
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": _gemma_scale(62),
        },
        rope=Rope(yarn=False, local="key"),
        offset=1.0,
        head_dim=True,
        period=6,
        ignored=("mm.tokens_per_image",),
    ),
    Family(
        "phi3",
        "phi3",
        block={
            "input_layernorm": "attn_norm",
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        fixed={"hidden_act": "silu"},
        rope=Rope(longrope=True, yarn=False),
        square=True,
        partial=True,
        unused_window=True,
    ),
    Family(
        "granite",
        "granite",
        settings=(
            Setting("logit_scale", "logits_scaling", float),
            Setting("residual_scale", "residual_multiplier", float, 1.0),
            Setting("embedding_scale", "embedding_multiplier", float, 1.0),
            Setting("attention.scale", "attention_multiplier", float, None),
        ),
        flags={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
        fixed={"hidden_act": "silu"},
        rope=Rope(factors=True, longrope=True),
        turned=True,
        square=True,
    ),
    Family(
        "smollm3",
        "smollm3",
        fixed={
            "hidden_act": "silu",
            "no_rope_layers": lambda fields: [
                int((layer + 1) % 4 != 0) for layer in range(fields["num_hidden_layers"])
            ],
            **NO_BIAS,
            **NO_WINDOWS,
        },
        turned=True,
        square=True,
    ),
    replace(
        _OLMO2,
        model_type="olmo3",
        rope=Rope(local="same"),
        period=4,
        window_default=REQUIRED,
        marker="attention.sliding_window",
    ),
    _OLMO2,
    Family(
        "starcoder2",
        "starcoder2",
        block={
            **ATTENTION,
            "post_attention_layernorm": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        eps=("attention.layer_norm_epsilon", "norm_epsilon"),
        fixed={"hidden_act": "gelu_pytorch_tanh", "use_bias": True, **NO_WINDOW},
        square=True,
    ),
    Family(
        "stablelm",
        "stablelm",
        eps=LAYER_NORM,
        flags={"use_qkv_bias": ATTENTION_BIAS, "use_parallel_residual": ("!ffn_norm.weight",)},
        fixed={"hidden_act": "silu", "qk_layernorm": False},
        square=True,
        head="own",
        partial=True,
        ignored=("use_parallel_residual",),
    ),
    Family(
        "phi2",
        "phi",
        block={
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.dense": "attn_output",
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
        },
        outer={**OUTER, "model.final_layernorm": "output_norm"},
        eps=LAYER_NORM,
        fixed={"hidden_act": "gelu_new", "qk_layernorm": False},
        square=True,
        head="own",
        partial=True,
    ),
    Family("exaone", "exaone", fixed={"hidden_act": "silu", **NO_BIAS}, rope=Rope(factors=True), head_dim=True),
    Family(
        "command-r",
        "cohere",
        block=_COHERE_BLOCK,
        settings=(Setting("logit_scale", "logit_scale", float, 1.0),),
        eps=LAYER_NORM,
        fixed={"hidden_act": "silu", "attention_bias": False, "use_qk_norm": False},
        square=True,
        head="tied",
    ),
    Family(
        "cohere2",
        "cohere2",
        block=_COHERE_BLOCK,
        settings=(Setting("logit_scale", "logit_scale", float),),
        eps=LAYER_NORM,
        fixed={"hidden_act": "silu", "attention_bias": False},
        head_dim=True,
        square=True,
        head="tied",
        period=4,
        window_default=REQUIRED,
    ),
    Family("ernie4_5", "ernie4_5", fixed={"hidden_act": "silu", "use_bias": False}, head_dim=True),
    Family(
        "glm4",
        "glm4",
        block={
            **ATTENTION,
            "post_self_attn_layernorm": "post_attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "post_mlp_layernorm": "post_ffw_norm",
        },
        flags={"attention_bias": ATTENTION_BIAS},
        fixed={"hidden_act": "silu"},
        head_dim=True,
        partial=True,
    ),
    Family(
        "nemotron",
        "nemotron",
        block={
            **ATTENTION,
            "post_attention_layernorm": "ffn_norm",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        eps=("attention.layer_norm_epsilon", "norm_eps"),
        flags={"attention_bias": ATTENTION_BIAS, "mlp_bias": MLP_BIAS},
        fixed={"hidden_act": "relu2"},
        offset=1.0,
        head_dim=True,
        square=True,
        head="own",
        partial=True,
    ),
    Family(
        "arcee",
        "arcee",
        block={
            **ATTENTION,
            "post_attention_layernorm": "ffn_norm",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        fixed={"hidden_act": "relu2", **NO_BIAS},
        rope=Rope(factors=True),
        turned=True,
        head_dim=True,
    ),
    Family(
        "seed_oss",
        "seed_oss",
        block={**ATTENTION, "post_attention_layernorm": "post_attention_norm", **MLP},
        flags={"attention_bias": ATTENTION_BIAS},
        fixed={"hidden_act": "silu", "attention_out_bias": False, "mlp_bias": False},
        head_dim=True,
    ),
    Family(
        "olmoe",
        "olmoe",
        block={**ATTENTION, **QK_NORM, "post_attention_layernorm": "ffn_norm", **EXPERTS},
        settings=(
            Setting("expert_count", "num_experts", int),
            Setting("expert_used_count", "num_experts_per_tok", int),
        ),
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "num_key_value_heads": lambda fields: fields[
                "num_attention_heads"
            ],  # the norm of k has the width of the model
        },
        square=True,
        head="own",
    ),
)
ARCHITECTURES = tuple(dict.fromkeys(family.architecture for family in FAMILIES))


def family_of_file(name: str, metadata: Mapping[str, Any]) -> Family:
    """The family of a GGUF file; raises HalfplateError for an unsupported architecture. name: as the user gave it."""
    architecture = metadata.get("general.architecture")
    for family in FAMILIES:
        marked = family.marker is None or metadata.get(f"{architecture}.{family.marker}")
        if family.architecture == architecture and family.imported and marked:
            return _MISTRAL if family is _LLAMA and not _divided(metadata) else family
    raise HalfplateError(
        f"model={name!r} has the GGUF architecture {architecture!r}, which Halfplate does not read; it reads "
        f"{', '.join(ARCHITECTURES)}: pass the model as a safetensors folder instead"
    )


def _divided(metadata: Mapping[str, Any]) -> bool:
    """Whether the heads of a file divide its width, which transformers asks of a Llama and not of a Mistral, which is the same otherwise."""
    width, heads = (metadata.get(f"llama.{key}") for key in ("embedding_length", "attention.head_count"))
    return not (isinstance(width, int) and isinstance(heads, int) and heads > 0) or width % heads == 0


def family_of_model(model_type: str) -> Family:
    """The family in which a model is written; raises HalfplateError for an unsupported model_type."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
    raise HalfplateError(
        f"format='gguf': models of type {model_type!r} are not written, only {known}; export it as dense and use llama.cpp's converter"
    )
