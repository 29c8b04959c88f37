"""Which calls of a model the native step handles: new tokens of each sequence, or a prompt, with a supported cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfplate.models.arguments import OLD_CACHE_ARGUMENT
from halfplate.runtime.cache import GrowingCache

LEAST_PROMPT = 32  # tokens; shorter prompts run through transformers
MOST_SEQUENCES = 64  # of a batch; larger ones run through transformers
# Supported types of the model; the native step computes in fp32 and rounds its logits.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Other arguments of a call with one new token, and the values that the native step supports.
HARMLESS = {
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), (None, False)),
    **dict.fromkeys(("labels", "inputs_embeds", "pixel_values", "token_type_ids"), (None,)),
    **dict.fromkeys(("return_dict", "use_cache"), (None, True)),
}


def cache_of(kwargs: dict[str, Any], cache_name: str) -> Any:
    """The cache argument of a call, under its name in this version of transformers or under the old one."""
    return kwargs.get(cache_name, kwargs.get(OLD_CACHE_ARGUMENT))


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of a call, int64 (sequences, count), with the positions and the padding of each sequence (`NativeDecoder.step_rows`).

    wanted: of how many of the last tokens of each sequence there are logits.
    """

    tokens: Tensor
    positions: Tensor | None
    first: Tensor | None
    wanted: int

    @property
    def plain(self) -> bool:
        """Whether they are those of one sequence without padding."""
        return self.tokens.numel() == 1 and self.positions is None and self.first is None


def new_tokens(model: Any, kwargs: dict[str, Any], cache_name: str) -> NewTokens | None:
    """The new tokens of a call that the native step handles, else None."""
    cache, ids = cache_of(kwargs, cache_name), kwargs.get("input_ids")
    if not isinstance(cache, GrowingCache) or ids is None or ids.ndim != 2 or not ids.shape[1]:
        return None
    length, (count, new) = cache.get_seq_length(), ids.shape
    if torch.is_grad_enabled() or model.training or not 1 <= count <= MOST_SEQUENCES:
        return None
    if (new > 1 and count * new < LEAST_PROMPT) or (new == 1 and not length):
        return None
    config = model.config
    asked = config.output_attentions or config.output_hidden_states or getattr(config, "output_router_logits", False)
    if asked or not (kwargs.get("return_dict") or config.return_dict):
        return None
    kept = kwargs.get("logits_to_keep", 0)
    if not isinstance(kept, int) or (length and cache.sequences != count) or not ids.is_cpu:
        return None
    known = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "cache_position"}
    known |= {cache_name, OLD_CACHE_ARGUMENT}
    for name, value in kwargs.items():
        if name not in known and (name not in HARMLESS or value not in HARMLESS[name]):
            return None
    positions, first = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None:
        if tuple(positions.shape) not in ((count, new), (1, new)) or not bool(
            ((positions >= 0) & (positions < length + new)).all()
        ):
            return None
        places = torch.arange(length, length + new, dtype=positions.dtype, device=positions.device)
        positions = None if bool((positions == places).all()) else positions.expand(count, new).long().contiguous()
    if first is not None:
        # Some models of several kinds of layers take a mask for each kind.
        if not isinstance(first, Tensor) or tuple(first.shape) != (count, length + new):
            return None
        first = _padding(first != 0)
        if first is None:
            return None
        first = first if bool(first.any()) else None
    return NewTokens(ids.long().contiguous(), positions, first, min(kept, new) or new)


def _padding(mask: Tensor) -> Tensor | None:
    """How many positions are masked before each sequence, int64 (sequences,); None if others are masked, too.

    mask: bool (sequences, length), true where a position is read.
    """
    masked = mask.shape[1] - mask.sum(1)
    starts = mask.long().argmax(1)
    # Everything from the first position on that is read must be read.
    return masked if bool(mask[:, -1].all()) and torch.equal(starts, masked) else None


def wants_growing_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` decodes as many sequences as the native step takes, and does not choose a cache."""
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = config or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    ways = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    return (
        inputs is not None
        and inputs.shape[0] * ways <= MOST_SEQUENCES
        and model.dtype in DTYPES
        and setting("use_cache") is not False
        # Gemma's files say `hybrid`, which `generate` itself takes for no choice.
        and setting("cache_implementation") in (None, "hybrid")
        and all(
            setting(name) is None
            for name in (
                "cache",
                OLD_CACHE_ARGUMENT,
                "assistant_model",
                "custom_generate",
                "prompt_lookup_num_tokens",
            )
        )
    )
