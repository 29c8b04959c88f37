"""Choosing the next token of one sequence by its own settings, as `generate` does for a batch with equal ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Settings that say when a text ends, or nothing about its tokens.
OTHERS = {
    *("max_length", "max_new_tokens", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("decoder_start_token_id", "do_sample", "use_cache", "transformers_version", "_from_model_config"),
    *("num_beams", "num_return_sequences", "return_dict_in_generate", "cache_implementation"),
}
TOP_K = 50  # of `generate`, if the settings do not say it


def _warpers(settings: Any) -> dict[str, Any]:
    """What changes the probabilities while sampling, in the order of `generate`, by its setting."""
    top_k = TOP_K if settings.top_k is None else settings.top_k
    found = {
        "temperature": settings.temperature not in (None, 1.0) and TemperatureLogitsWarper(settings.temperature),
        "top_k": top_k != 0 and TopKLogitsWarper(top_k),
        "top_p": settings.top_p is not None and settings.top_p < 1 and TopPLogitsWarper(settings.top_p),
        "min_p": settings.min_p is not None and MinPLogitsWarper(settings.min_p),
    }
    return {name: warper for name, warper in found.items() if warper}


def is_known(settings: Any) -> bool:
    """Whether `chooser` follows all settings that differ from the defaults."""
    known = OTHERS | {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    return set(settings.to_diff_dict()) <= known and settings.cache_implementation in (None, "hybrid")


def chooser(settings: Any) -> Callable[[Tensor, Tensor], int]:
    """A function of the tokens so far, int64 (1, tokens), and fp32 logits (1, vocabulary) that chooses the next token."""
    process: Any = LogitsProcessorList()
    if settings.repetition_penalty not in (None, 1.0):
        process.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if not settings.do_sample:
        return lambda ids, logits: int(process(ids, logits).argmax(-1))
    process.extend(_warpers(settings).values())
    return lambda ids, logits: int(process(ids, logits).softmax(-1).multinomial(1))
