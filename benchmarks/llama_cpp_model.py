"""The same model in llama.cpp: an F16 GGUF file of a dense Llama, llama.cpp's own quantiser, and its logits.

Token ids are numbers in these files, which hold no vocabulary.
"""

import ctypes
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common  # noqa: F401  (keeps kernels.py from transformers)
import numpy as np
import torch
from random_weights import GGUF_NAMES
from torch import Tensor

from halfplate.models.linears import find_linears

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama_ftype of llama.h


def write_f16(model: Any, path: Path) -> None:
    """Write a Llama of transformers as a GGUF file of F16 matrices and F32 norms."""
    import gguf

    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")

    def add(name: str, matrix: Tensor, dtype: Any = np.float16) -> None:
        writer.add_tensor(f"{name}.weight", matrix.detach().float().numpy().astype(dtype))

    add("token_embd", model.get_input_embeddings().weight)
    for linear in find_linears(model)[0]:
        inner = linear.name.split(f"layers.{linear.block}.")[1]
        weight = model.get_submodule(linear.name).weight
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if inner.endswith(projection):
                weight = _interleaved(weight, count)
        add(f"blk.{linear.block}.{GGUF_NAMES[inner]}", weight)
    for number, block in enumerate(model.model.layers):
        add(f"blk.{number}.attn_norm", block.input_layernorm.weight, np.float32)
        add(f"blk.{number}.ffn_norm", block.post_attention_layernorm.weight, np.float32)
    add("output_norm", model.model.norm.weight, np.float32)
    if not config.tie_word_embeddings:
        add("output", model.get_output_embeddings().weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows (d_out, d_in) in the order of llama.cpp, whose rotary embedding turns neighbours and not halves of a head."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def quantise(source: Path, path: Path, kind: str) -> None:
    """llama.cpp's own quantiser with its defaults; `kind` is one of FILE_TYPES."""
    llama = library()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[kind], torch.get_num_threads()
    if failed := llama.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp cannot quantise to {kind}: it failed with {failed}")


def contents(path: Path) -> dict[str, Any]:
    """Bytes of the linears of the decoder blocks, how many are of which type, and the type of the embedding."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    linears = [t for t in tensors if t.name.startswith("blk.") and "norm" not in t.name]
    (embedding,) = (t for t in tensors if t.name == "token_embd.weight")
    return {
        "nbytes": int(sum(t.n_bytes for t in linears)),
        "matrices": len(linears),
        "types": dict(Counter(t.tensor_type.name for t in linears).most_common()),
        "embedding": embedding.tensor_type.name,
    }


def library() -> Any:
    """llama_cpp, silent; raises ImportError where it is not installed."""
    return _library()[0]


@cache
def _library() -> tuple[Any, Any]:
    """llama_cpp and its log function, which has to live as long."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, None)
    llama_cpp.llama_backend_init()
    return llama_cpp, silence


class LlamaCppLogits:
    """A GGUF file that answers like a model of transformers: logits of every token of int64 (n, L), window by window."""

    def __init__(self, path: Path, config: Any, seq_len: int, threads: int) -> None:
        self.config, self.device = config, torch.device("cpu")
        self._llama = llama = library()
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        # Their products are the same numbers, sooner; those for AMX stop the process on some virtual machines.
        settings.use_extra_bufts = False
        self._model = llama.llama_model_load_from_file(str(path).encode(), settings)
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = seq_len
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        self._batch = llama.llama_batch_init(seq_len, 0, 1)

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=torch.stack([self._window(ids.tolist()) for ids in input_ids]))

    def _window(self, ids: list[int]) -> Tensor:
        """Logits (L, vocabulary)."""
        llama, batch = self._llama, self._batch
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        if failed := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot read the window: it failed with {failed}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (len(ids), self.config.vocab_size))
        return torch.from_numpy(logits.copy())

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)
