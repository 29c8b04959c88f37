"""Checking that this machine has enough memory for generating text."""

from typing import Any

from halfplate.calibration.self_text import token_nbytes
from halfplate.headroom import check_memory

# Tokens in the cache that is measured. Few lengths, because each takes a second; a shorter cache never has fewer bytes per token.
MEASURED = (1024, 256, 64, 16)


def check_generation(config: Any, prompt: int, new_tokens: int, argument: str = "max_new_tokens") -> None:
    """Raise HalfplateError if the keys and values of `prompt` and `new_tokens` would not fit into the free memory.

    argument: the name of `new_tokens` in the error.
    """
    tokens = prompt + new_tokens
    each = token_nbytes(config, next((length for length in MEASURED if length <= tokens), MEASURED[-1]))
    what = f"keys and values of {argument}={new_tokens} after {prompt} tokens of prompt"
    check_memory(what, each * tokens, argument, new_tokens)
