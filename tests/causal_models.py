"""Tiny configurations of architectures whose blocks hold more than plain linears."""

from typing import Any

MOE: dict[str, Any] = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
INDEXER: dict[str, Any] = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 4}
DELTA: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# By model_type: what differs from the sizes of conftest, and the last parts of the names that stay dense with a word of the reason.
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "deepseek_v32": (
        MOE | MLA | INDEXER,
        {"wq_b": "indexer", "wk": "indexer", "weights_proj": "indexer", "gate": "router"},
    ),
    "glm_moe_dsa": (MOE | MLA | INDEXER, {"wq_b": "indexer", "wk": "indexer", "weights_proj": "indexer"}),
    "axk2": (MOE | MLA | INDEXER, {"wq_b": "indexer", "wk": "indexer", "weights_proj": "indexer"}),
    "hunyuan_v1_moe": (MOE | {"head_dim": 8, "moe_topk": 2}, {"wg": "part of a gate"}),
    "qwen3_5_text": (DELTA, {"in_proj_a": "gate of linear attention", "in_proj_b": "gate of linear attention"}),
    "qwen3_next": (
        MOE | DELTA | {"shared_expert_intermediate_size": 16},
        {"in_proj_ba": "gate of linear attention", "shared_expert_gate": "router"},
    ),
    "gpt_oss": (MOE | {"head_dim": 8}, {"router": "router of 8"}),
    "mixtral": (MOE, {"gate": "router of 8"}),
    "olmoe": (MOE, {"gate": "router of 8"}),
    "granitemoe": (MOE, {"router": "router of 8"}),
    "phimoe": (MOE, {"router": "router of 8"}),
    "jamba": (
        MOE | {"mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
        {"dt_proj": "read as data by JambaMambaMixer.forward"},
    ),
    "bloom": ({}, {}),
    "falcon": ({}, {}),
}  # fmt: skip
