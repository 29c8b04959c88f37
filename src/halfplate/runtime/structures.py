"""ctypes mirrors of the structures in kernels/src/runtime.h, for the native step."""

import ctypes

Pointer, Integer, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class ExpertStruct(ctypes.Structure):
    """Mirror of `halfplate::Expert` in kernels/src/runtime.h."""

    _fields_ = [*[(name, Pointer) for name in ("gate", "up", "down")], ("bytes", Integer * 3)]


class MixtureStruct(ctypes.Structure):
    """Mirror of `halfplate::Mixture` in kernels/src/runtime.h."""

    _fields_ = [
        *[(name, Pointer) for name in ("router", "correction")],
        ("expert", ctypes.POINTER(ExpertStruct)),
        *[(name, Integer) for name in ("experts", "chosen", "normalised", "logistic", "groups", "chosen_groups")],
        *[(name, Integer) for name in ("router_bytes", "correction_bytes", "expert_bytes")],
        ("shared", ExpertStruct),
        ("shared_gate", Pointer),
        *[(name, Integer) for name in ("shared_intermediate", "shared_gate_bytes")],
        *[(name, Float) for name in ("scale", "least_sum")],
    ]


class BlockStruct(ctypes.Structure):
    """Mirror of `halfplate::DecoderBlock` in kernels/src/runtime.h."""

    _fields_ = [
        ("norms", Pointer * 4),
        *[(name, Pointer) for name in ("query_norm", "key_norm", "q", "k", "v", "o", "sinks")],
        ("mlp", ExpertStruct),
        ("mixture", MixtureStruct),
        *[(name, Pointer) for name in ("keys", "values", "key_scales", "value_scales")],
        *[(name, Integer) for name in ("intermediate", "window", "rotary")],
        ("norm_bytes", Integer * 6),
        ("linear_bytes", Integer * 4),
        ("cache_bytes", Integer * 4),
        ("sink_bytes", Integer),
    ]


class DecoderStruct(ctypes.Structure):
    """Mirror of `halfplate::Decoder` in kernels/src/runtime.h."""

    _fields_ = [
        *[(name, Integer) for name in ("hidden", "heads", "kv_heads", "head_dim", "vocabulary", "blocks", "capacity")],
        *[(name, Integer) for name in ("rotary_dim", "rotary_pairs", "tables", "norm", "activation")],
        *[(name, Integer) for name in ("gated", "parallel", "whole_norms", "late_norms")],
        *[(name, Float) for name in ("epsilon", "embedding_scale", "attention_scale", "residual_scale")],
        *[(name, Float) for name in ("logit_scale", "gate_alpha", "gate_limit", "attention_cap", "logit_cap")],
        *[(name, Pointer * 2) for name in ("cosines", "sines")],
        *[(name, Pointer) for name in ("final_norm", "head")],
        ("block", ctypes.POINTER(BlockStruct)),
        ("scratch", Pointer),
        ("table_bytes", Integer * 4),
        *[(name, Integer) for name in ("final_norm_bytes", "head_bytes", "block_bytes", "scratch_bytes")],
        *[
            (name, Integer)
            for name in ("sized_threads", "sized_capacity", "sized_sequences", "sized_rows", "sized_floats")
        ],
        *[(name, Integer) for name in ("sequences", "rows", "cache_kind")],
    ]


class BatchStruct(ctypes.Structure):
    """Mirror of `halfplate::Batch` in kernels/src/runtime.h."""

    _fields_ = [
        ("embeddings", Pointer),
        ("slot", Integer),
        *[(name, Pointer) for name in ("positions", "first", "logits")],
        ("bytes", Integer * 4),
        *[(name, Integer) for name in ("count", "wanted", "exact")],
    ]
