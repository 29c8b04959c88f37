"""Checking that this machine has enough memory for generating text."""

from typing import Any

from halfplate.calibration.self_text import token_nbytes
from halfplate.headroom import check_memory

MEASURED = 1024  # tokens in the cache that is measured


def check_generation(config: Any, prompt: int, new_tokens: int, argument: str = "max_new_tokens") -> None:
    """Raise HalfplateError if the keys and values of `prompt` and `new_tokens` would not fit into the free memory.

    argument: the name of `new_tokens` in the error.
    """
    tokens = prompt + new_tokens
    each = token_nbytes(config, min(tokens, MEASURED))
    what = f"keys and values of {argument}={new_tokens} after {prompt} tokens of prompt"
    check_memory(what, each * tokens, argument, new_tokens)
