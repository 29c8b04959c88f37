"""Tiny models for the native step: one or more of every class of transformers that it decodes."""

import torch

from causal_models import MOE
from conftest import build_model

HEAD = {"head_dim": 8}
WINDOW = HEAD | {"sliding_window": 5}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
TWO_TABLES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    }
}
# Half of the groups, and not those of the largest scores alone; as many ordinary layers as mixtures.
GROUPED = HEAD | {
    **MOE,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 4,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}
# A case is a model type and its options. Windows are shorter than the texts, and every class of the table has a case.
CASES = {
    "arcee": ("arcee", HEAD),
    "cohere": ("cohere", {"logit_scale": 0.4}),
    "cohere2": ("cohere2", MIXED | {"logit_scale": 0.4}),
    "cwm": ("cwm", MIXED),
    "dots1": (
        "dots1",
        GROUPED | WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2, "norm_topk_prob": False},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        MOE
        | HEAD
        | {"use_bias": True, "moe_k": 2, "moe_num_experts": 8, "moe_norm_min": 0.6, "moe_num_shared_experts": 2},
    ),
    "ernie4_5_moe without shared experts": ("ernie4_5_moe", MOE | HEAD | {"moe_num_shared_experts": 0}),
    "ernie4_5": ("ernie4_5", HEAD | {"use_bias": True}),
    "exaone4": ("exaone4", MIXED),
    "exaone4 without windows": ("exaone4", HEAD | {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "flex_olmo": ("flex_olmo", MOE | {"norm_topk_prob": True}),
    "gemma": ("gemma", HEAD),
    "gemma2": (
        "gemma2",
        MIXED | {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        MIXED | TWO_TABLES | {"num_hidden_layers": 2, "query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0},
    ),
    "glm": ("glm", HEAD | PARTIAL | {"attention_bias": True}),
    "glm4": ("glm4", HEAD | PARTIAL),
    "glm4_moe": ("glm4_moe", GROUPED | PARTIAL | {"attention_bias": True}),
    "glm4_moe with norms of heads": ("glm4_moe", GROUPED | {"use_qk_norm": True, "n_group": 1, "topk_group": 1}),
    "gpt_oss": ("gpt_oss", MOE | MIXED | {"swiglu_limit": 0.4}),
    "granite": ("granite", SCALES | {"mlp_bias": True}),
    "granitemoe": ("granitemoe", MOE | SCALES),
    "granitemoeshared": ("granitemoeshared", MOE | SCALES | {"shared_intermediate_size": 24}),
    "granitemoeshared without a shared expert": ("granitemoeshared", MOE | SCALES | {"shared_intermediate_size": 0}),
    "helium": ("helium", HEAD),
    "hunyuan": ("hunyuan_v1_dense", HEAD),
    "llama with exact gelu": ("llama", HEAD | {"hidden_act": "gelu"}),
    "minimax_m2": ("minimax_m2", MOE | HEAD | PARTIAL),
    "ministral": ("ministral", MIXED),
    "mistral": ("mistral", WINDOW),
    "mixtral": ("mixtral", MOE | WINDOW),
    "nemotron": ("nemotron", HEAD | PARTIAL),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED | TWO_TABLES),
    "olmoe": ("olmoe", MOE),
    "phi": ("phi", PARTIAL | {"num_key_value_heads": 4}),
    "phi3": ("phi3", PARTIAL | {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False}),
    "qwen3": ("qwen3", MIXED | {"use_sliding_window": True}),
    "qwen3_moe": ("qwen3_moe", MOE | HEAD | {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    "qwen3_moe, not normalised": ("qwen3_moe", MOE | WINDOW | {"use_sliding_window": True, "norm_topk_prob": False}),
    "qwen3_moe with an ordinary layer": ("qwen3_moe", MOE | HEAD | {"mlp_only_layers": [0]}),
    "seed_oss": ("seed_oss", HEAD | {"attention_bias": True, "attention_out_bias": False}),
    "solar_open": ("solar_open", GROUPED),
    "smollm3": ("smollm3", MIXED | {"use_sliding_window": True, "no_rope_layers": [0, 1]}),
    "stablelm": ("stablelm", PARTIAL | {"use_qkv_bias": True}),
    "starcoder2": ("starcoder2", WINDOW | {"use_bias": True}),
}


def decoding_model(kind, options):
    """The model of a case. Corrections of scores, which start as zeros, are large enough to change choices."""
    model = build_model(kind, **options)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def close(found, expected):
    """Check that two tensors are equal up to rounding in fp32."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
