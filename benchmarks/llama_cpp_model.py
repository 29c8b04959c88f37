"""The same model in llama.cpp: its own quantiser, what a file of it holds, and its logits."""

import ctypes
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama_ftype of llama.h


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


def version() -> str:
    """Of llama_cpp, for the line above a table."""
    return f"llama-cpp-python {library().__version__}"


def tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """llama.cpp's tokens of each text, special tokens in it and around it included; the file may hold a vocabulary alone."""
    llama = library()
    settings = llama.llama_model_default_params()
    settings.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {path}")
    try:
        vocabulary = llama.llama_model_get_vocab(model)
        return [_tokens(vocabulary, text.encode()) for text in texts]
    finally:
        llama.llama_model_free(model)


def _tokens(vocabulary: Any, text: bytes) -> list[int]:
    ids = (ctypes.c_int32 * (len(text) + 16))()
    count = library().llama_tokenize(vocabulary, text, len(text), ids, len(ids), True, True)
    if count < 0:
        raise RuntimeError(f"llama.cpp cannot tokenise {text!r}: it failed with {count}")
    return list(ids[:count])


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
