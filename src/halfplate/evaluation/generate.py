"""Continuing a prompt with any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.arguments import path_text
from halfplate.calibration.documents import check_unicode
from halfplate.calibration.vocabulary import check_tokens
from halfplate.checkpoint.loading import load_any
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.limits import use_threads
from halfplate.models.context import positions
from halfplate.runtime import greedy
from halfplate.runtime.limits import check_generation


@plain_defaults()
def generate(
    model: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    chat: bool = False,
    threads: int | None = None,
    activations: str = "float",
) -> str:
    """Continue `prompt` by greedy decoding and return the new text.

    - model: a checkpoint, a folder, a Hub id or a `.gguf` file
    - chat: format the prompt as a user message with the model's chat template, and return only the answer
    - threads: number of CPU threads, None for all
    - activations: as in `halfplate.load`

    Raises HalfplateError on bad input, and if prompt and answer exceed the positions of the model.
    """
    return answers(model, [prompt], max_new_tokens, chat, threads, activations)[0]


def answers(
    model: str | Path,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    chat: bool = False,
    threads: int | None = None,
    activations: str = "float",
) -> list[str]:
    """`generate` for each of `prompts`; the model is loaded once."""
    name = path_text("model", model)
    use_threads(threads)
    loaded, tokenizer = load_any(name, activations=activations)
    return [_answer(name, loaded, tokenizer, prompt, max_new_tokens, chat) for prompt in prompts]


def _answer(name: str, loaded: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool) -> str:
    ids = _token_ids(name, prompt, chat, tokenizer)
    length = ids.shape[1]
    limit = positions(loaded)
    if length == 0:
        raise HalfplateError(f"prompt={prompt!r} has no tokens; give some text")
    if limit is not None and length + max_new_tokens > limit:
        raise HalfplateError(
            f"max_new_tokens={max_new_tokens} after {length} tokens of prompt exceeds the {limit} positions of {name!r}; "
            f"try {'--max-new-tokens ' + str(limit - length) if length < limit else 'a shorter prompt'}"
        )
    check_tokens(ids, loaded, f"prompt={prompt!r}", tokenizer)
    check_generation(loaded.config, length, max_new_tokens)
    tokens = greedy(loaded, ids, max_new_tokens, _stop_ids(loaded))
    text: str = tokenizer.decode(tokens[0, length:] if chat else tokens[0], skip_special_tokens=True)
    return text


def _token_ids(name: str, prompt: str, chat: bool, tokenizer: Any) -> Tensor:
    """The prompt as int64 (1, tokens)."""
    check_unicode(prompt, "prompt")
    if not chat:
        return torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64, device="cpu")
    if not tokenizer.chat_template:
        raise HalfplateError(f"--chat needs a chat template, and the tokenizer of {name!r} has none; leave --chat out")
    message = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return torch.tensor([encoded["input_ids"]], dtype=torch.int64, device="cpu")


def _stop_ids(model: Any) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
