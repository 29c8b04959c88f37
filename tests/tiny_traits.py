"""The sizes of the tiny models of benchmarks/architectures.py, by the name of an entry and by architecture."""

from __future__ import annotations

from typing import Any

VOCABULARY = 320
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_blocks",
    "layers",
)
SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size", "unpadded_vocab_size", "decoder_vocab_size"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_dim", "projection_dim", "out_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("dim", "emb_dim", "projection_size", "proj_dim", "output_dim", "text_hidden_size", "output_size"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"), 48
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "max_source_positions",
            "max_target_positions",
            "n_ctx",
        ),
        128,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(
        ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts"), 1),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_intermediate_size",
        ),
        16,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window"), 6),
    "first_k_dense_replace": 1,
    "is_decoder": True,
    "image_size": 28,
    "patch_size": 14,
    "index_topk": 4,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "hidden_size_per_layer_input": 8,
}

# What differs from them, by model type: `...` leaves an entry out, and a dictionary belongs to a part of the configuration.
DIFFERENT: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "n_routed_experts": 4,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 0.5,
    },
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 3},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "gemma4": {"text_config": {"num_kv_shared_layers": 2}, "vision_config": {"model_type": "gemma4_vision"}},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "jamba": {
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 4,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 4},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "qwen4_exp_text": {
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "num_hidden_layers": 4,
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
        "number_of_conv_states": ...,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "xlstm": {
        "num_heads": 2,
        "embedding_dim": 32,
        "num_blocks": ...,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 1.0,
        "chunk_size": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "kv_channels": 8,
        "num_query_groups": 4,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "sliding_window": 6,
        "num_hidden_layers": 3,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "router_hidden_size": 16,
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 16], "moe_num_shared_experts": 1}},
    "granite4_vision": {"vision_config": {"patch_size": 14}, "spatial_target_layers": [0, 1]},
    "step3p7": {"text_config": {"sliding_window": 6}},
    **{
        kind: {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            }
        }
        for kind in (
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
        )
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.5,
            }
        }
    },
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8192,
        }
    },
    "hunyuan_vl": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
        }
    },
    "molmo2": {"vision_config": {"image_size": [28, 28]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "apertus1p5": {"audio_config": {"codebook_dim": 32}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "dots3_note": {"adapter_in_dim": 32},
    "emu3": {"vocabulary_map": {"<image>": 300}},
    "chameleon": {"vocabulary_map": {"<image>": 300}},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "xlnet": {"d_head": 8, "d_inner": 48},
}
