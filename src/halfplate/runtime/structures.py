"""ctypes mirrors of the structures in kernels/src/runtime.h, for the native step."""

import ctypes


class BlockStruct(ctypes.Structure):
    """Mirror of `halfplate::DecoderBlock` in kernels/src/runtime.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q", "k", "v", "o", "gate", "up", "down")],
        *[(name, ctypes.c_void_p) for name in ("keys", "values", "query_norm", "key_norm")],
        ("norm_bytes", ctypes.c_int64 * 4),
        ("linear_bytes", ctypes.c_int64 * 7),
        ("cache_bytes", ctypes.c_int64 * 2),
    ]


class DecoderStruct(ctypes.Structure):
    """Mirror of `halfplate::Decoder` in kernels/src/runtime.h."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary")],
        *[(name, ctypes.c_int64) for name in ("blocks", "capacity")],
        *[(name, ctypes.c_float) for name in ("epsilon", "embedding_scale", "attention_scale")],
        *[(name, ctypes.c_void_p) for name in ("cosines", "sines", "final_norm", "head")],
        ("block", ctypes.POINTER(BlockStruct)),
        ("scratch", ctypes.c_void_p),
        ("table_bytes", ctypes.c_int64 * 2),
        *[(name, ctypes.c_int64) for name in ("final_norm_bytes", "head_bytes", "block_bytes", "scratch_bytes")],
        *[(name, ctypes.c_int64) for name in ("sized_threads", "sized_capacity", "sized_sequences", "sized_floats")],
        *[(name, ctypes.c_int64) for name in ("sequences", "cache_kind")],
    ]


class BatchStruct(ctypes.Structure):
    """Mirror of `halfplate::Batch` in kernels/src/runtime.h."""

    _fields_ = [
        ("embeddings", ctypes.c_void_p),
        ("slot", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("positions", "first", "logits")],
        ("bytes", ctypes.c_int64 * 4),
    ]
