"""llama.cpp through llama_cpp: the library, silent, and its tokens of texts."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


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
