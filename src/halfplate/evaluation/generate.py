"""Continuing a prompt with any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from halfplate.runtime.prompt_file import PromptFile
from halfplate.runtime.prompts import begin, check_cache_dtype


@dataclass(frozen=True)
class GenerateSettings:
    """How `generate` continues a prompt; its fields are the arguments of `generate`."""

    max_new_tokens: int = 64
    chat: bool = False
    cache_dtype: str = "fp32"
    prompt_cache: str | Path | None = None
    lookup: int = 0
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.lookup < 0:
            raise HalfplateError(f"lookup={self.lookup} is out of range; expected at least 0")


@plain_defaults()
def generate(
    model: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    chat: bool = False,
    threads: int | None = None,
    activations: str = "auto",
    cache_dtype: str = "fp32",
    prompt_cache: str | Path | None = None,
    lookup: int = 0,
    fit: int | str | None = None,
) -> str:
    """Continue `prompt` by greedy decoding and return the new text.

    - model: a checkpoint, a folder, a Hub id or a `.gguf` file
    - chat: format the prompt as a user message with the model's chat template, and return only the answer
    - threads: number of CPU threads, None for all
    - activations, fit: as in `halfplate.load`
    - cache_dtype: type of keys and values, `fp32`, `bf16` or `int8` (one scale per vector)
    - prompt_cache: a file for the keys and values of the prompt; a later prompt that begins with the same tokens reads only the rest
    - lookup: most tokens that are guessed at once from the text so far and checked in one step; 0 for none

    Raises HalfplateError on bad input, and if prompt and answer exceed the positions of the model.
    """
    settings = GenerateSettings(max_new_tokens, chat, cache_dtype, prompt_cache, lookup)
    return answers(model, [prompt], settings, threads, activations, fit)[0]


def answers(
    model: str | Path,
    prompts: Sequence[str],
    settings: GenerateSettings,
    threads: int | None = None,
    activations: str = "auto",
    fit: int | str | None = None,
) -> list[str]:
    """`generate` for each of `prompts`; the model is loaded once."""
    name = path_text("model", model)
    use_threads(threads)
    loaded, tokenizer = load_any(name, activations=activations, fit=fit)
    dtype = check_cache_dtype(loaded, settings.cache_dtype)
    file = None if settings.prompt_cache is None else PromptFile(loaded, settings.prompt_cache, dtype)
    found = [_answer(name, loaded, tokenizer, prompt, settings, dtype, file) for prompt in prompts]
    if file is not None:
        file.write()
    return found


def _answer(
    name: str,
    loaded: Any,
    tokenizer: Any,
    prompt: str,
    settings: GenerateSettings,
    dtype: torch.dtype,
    file: PromptFile | None,
) -> str:
    ids = _token_ids(name, prompt, settings.chat, tokenizer)
    length, new_tokens = ids.shape[1], settings.max_new_tokens
    limit = positions(loaded)
    if length == 0:
        raise HalfplateError(f"prompt={prompt!r} has no tokens; give some text")
    if limit is not None and length + new_tokens > limit:
        raise HalfplateError(
            f"max_new_tokens={new_tokens} after {length} tokens of prompt exceeds the {limit} positions of {name!r}; "
            f"try {'--max-new-tokens ' + str(limit - length) if length < limit else 'a shorter prompt'}"
        )
    check_tokens(ids, loaded, f"prompt={prompt!r}", tokenizer)
    check_generation(loaded.config, length, new_tokens)
    own_cache = file is not None or dtype != torch.float32
    cache = begin(loaded, None if file is None else file.prompt, ids[0], dtype) if own_cache else None
    tokens = greedy(loaded, ids, new_tokens, _stop_ids(loaded), cache=cache, lookup=settings.lookup)
    if file is not None and cache is not None:
        file.keep(cache, ids[0])
    text: str = tokenizer.decode(tokens[0, length:] if settings.chat else tokens[0], skip_special_tokens=True)
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
