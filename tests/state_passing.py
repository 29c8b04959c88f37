"""Sizes of tiny models whose blocks are given or hand on more than one hidden state of shape (samples, L, d)."""

from typing import Any

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
}
GEMMA = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 5,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    # Inputs of each layer by token, shared keys and values, several streams before the samples.
    "gemma3n_text": GEMMA
    | {"altup_num_inputs": 3, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": GEMMA | {"global_head_dim": 8},
    # The state of a router passes from block to block.
    "zaya": EXPERTS | {"num_experts_per_tok": 1, "num_hidden_layers": 3, "head_dim": 8, "router_hidden_size": 16},
    # Several streams after the length, tokens that decide the experts.
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "hc_mult": 2,
        "sliding_window": 6,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 0.5,
    },
    # Chosen positions pass from block to block.
    "hy_v4": {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "hc_mult": 2,
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    "qwen4_exp_text": EXPERTS
    | LINEAR_ATTENTION
    | {
        "num_hidden_layers": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 8,
        "ple_conv_kernel_size": 2,
        "ngram_size": 2,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "qwen3_next": EXPERTS | LINEAR_ATTENTION | {"num_hidden_layers": 4},
    "minimax": {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 8,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
}


def build_dbrx() -> Any:
    """Dbrx has sizes of other names than other models."""
    import torch
    from transformers import AutoModelForCausalLM, DbrxConfig

    config = DbrxConfig(
        vocab_size=320,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        bos_token_id=1,
        eos_token_id=2,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
