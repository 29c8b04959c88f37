"""Which calls of a model the native step handles: one new token of one sequence with a supported cache."""

from typing import Any

import torch

from halfplate.models.arguments import OLD_CACHE_ARGUMENT
from halfplate.runtime.cache import GrowingCache

# Supported types of the model; the native step computes in fp32 and rounds its logits.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Other arguments of a call with one new token, and the values that the native step supports.
HARMLESS = {"output_attentions": (None, False), "output_hidden_states": (None, False), "labels": (None,)} | {
    "inputs_embeds": (None,),
    "return_dict": (None, True),
    "use_cache": (None, True),
}


def cache_of(kwargs: dict[str, Any], cache_name: str) -> Any:
    """The cache argument of a call, under its name in this version of transformers or under the old one."""
    return kwargs.get(cache_name, kwargs.get(OLD_CACHE_ARGUMENT))


def single_token(model: Any, kwargs: dict[str, Any], cache_name: str) -> int | None:
    """The new token of a call that the native step handles, else None."""
    cache, ids = cache_of(kwargs, cache_name), kwargs.get("input_ids")
    if not isinstance(cache, GrowingCache) or ids is None or tuple(ids.shape) != (1, 1):
        return None
    length = cache.get_seq_length()
    if torch.is_grad_enabled() or model.training or not length or not cache.fits_one_sequence_in_floats:
        return None
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (tuple(mask.shape) != (1, length + 1) or not bool(mask.all())):
        return None
    if positions is not None and positions.tolist() != [[length]]:
        return None
    config = model.config
    if config.output_attentions or config.output_hidden_states or not (kwargs.get("return_dict") or config.return_dict):
        return None
    if not isinstance(kwargs.get("logits_to_keep", 0), int):
        return None
    known = {"input_ids", "attention_mask", "position_ids", "logits_to_keep", "cache_position"}
    known |= {cache_name, OLD_CACHE_ARGUMENT}
    for name, value in kwargs.items():
        if name not in known and (name not in HARMLESS or value not in HARMLESS[name]):
            return None
    return int(ids[0, 0])


def wants_growing_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` decodes one sequence and does not choose a cache."""
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = config or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    return (
        inputs is not None
        and inputs.shape[0] == 1
        and model.dtype in DTYPES
        and setting("use_cache") is not False
        and (setting("num_beams") or 1) == 1
        and (setting("num_return_sequences") or 1) == 1
        and all(
            setting(name) is None
            for name in (
                "cache",
                OLD_CACHE_ARGUMENT,
                "cache_implementation",
                "assistant_model",
                "custom_generate",
                "prompt_lookup_num_tokens",
            )
        )
    )
