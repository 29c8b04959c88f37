"""Decoding several sequences of equal length side by side, a token at a time, for text that a model samples from itself."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.models.arguments import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBED = 4  # tokens to test a decoding with
WORST_DIFFERENCE = 0.2  # relative difference of logits with and without the cache
# The same for a decoding that replaces the model's own: rounding in bf16 causes 0.01.
WORST_REPLACEMENT = 0.05

# Logits (sequences, vocabulary) of the token after the current ones, int64 (sequences,).
Step = Callable[[Tensor], Tensor]


class Decoding(Protocol):
    """A way to decode."""

    @property
    def path(self) -> str:
        """Its name for the record."""

    def start(self, sequences: int) -> Step:
        """Begin `sequences` sequences; the step may be called once for each token of them."""


# Returns a decoding for sequences of this length, or why there is none.
Maker = Callable[["PreTrainedModel", int], Decoding | str]


class OwnDecoding:
    """The forward of the model itself, with a preallocated cache if it takes one.

    Raises HalfplateError if the model fails, or if its logits with the cache differ from those without.
    """

    def __init__(self, model: "PreTrainedModel", seq_len: int, path: str = "transformers") -> None:
        self.path = path
        self._model = model
        self._new_cache = _cache_maker(model, seq_len)

    def start(self, sequences: int) -> Step:
        cache = self._new_cache()

        def step(current: Tensor) -> Tensor:
            nonlocal cache
            logits, cache = _next_logits(self._model, current[:, None], cache)
            return logits

        return step


def decoding_of(model: "PreTrainedModel", seq_len: int, maker: Maker | None = None) -> Decoding:
    """The decoding of `maker` if its logits are those of the model, else that of the model itself."""
    own = OwnDecoding(model, seq_len)
    if maker is None or seq_len < PROBED:
        return own
    found = maker(model, seq_len)
    if not isinstance(found, str):
        difference = _difference(found, model)
        if difference < WORST_REPLACEMENT:
            return found
        found = f"the logits of the {found.path} differ by {difference:.2g}"
    own.path = f"transformers: {found}"
    return own


def _probe(model: "PreTrainedModel") -> Tensor:
    # Two texts, because some models mix up the sequences of a batch.
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.arange(2 * PROBED, dtype=torch.int64, device=model.device).reshape(2, PROBED) % vocabulary


def _difference(decoding: Decoding, model: "PreTrainedModel") -> float:
    """Relative difference of the logits after a few tokens from those of the model without a cache."""
    ids = _probe(model)
    step = decoding.start(len(ids))
    for position in range(PROBED):
        logits = step(ids[:, position])
    whole = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    return float((logits.float() - whole).norm() / whole.norm())


def _cache_maker(model: "PreTrainedModel", seq_len: int) -> Callable[[], Any]:
    """A function that creates the cache of a batch: a preallocated one, or None for models that create their own.

    Raises HalfplateError if the model fails, or if its logits with the cache differ from those without.
    """
    from transformers import DynamicCache

    from halfplate.calibration.cache import preallocated_cache

    def with_room() -> DynamicCache:
        return preallocated_cache(model.config, seq_len)

    ids = _probe(model)
    try:
        _, own = _next_logits(model, ids[:, :1], None)
        if type(own) is DynamicCache:
            return with_room
        # Some models accept a cache and do not return it.
        new_cache: Callable[[], Any] = with_room if own is None else lambda: None
        cache = new_cache()
        for position in range(PROBED):
            logits, cache = _next_logits(model, ids[:, position : position + 1], cache)
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
    # Model code can raise any exception.
    except Exception as error:
        if isinstance(error, HalfplateError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise HalfplateError(
            f"calibration=self: {type(model).__name__} cannot sample text ({reason}); pass a text file with --calibration"
        ) from error
    difference = float((logits - whole).norm() / whole.norm())
    # Kernels round differently for one token and for several; a broken cache causes far larger differences.
    if not difference < WORST_DIFFERENCE:
        raise HalfplateError(
            f"calibration=self: {type(model).__name__} computes different logits token by token than for a whole text (relative difference "
            f"{difference:.2g}), so it cannot sample text; pass a text file with --calibration"
        )
    return new_cache


def _next_logits(model: "PreTrainedModel", current: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits (sequences, vocabulary) of the token after `current` int64 (sequences, 1), and the updated cache.

    cache: None if the model creates one; the returned cache is that of the output, if it has one.
    """
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_NAMES if name in taken), None)
    output = model(input_ids=current, use_cache=True, **({} if name is None or cache is None else {name: cache}))
    logits: Tensor = output.logits
    if logits.shape[1] != current.shape[1]:
        raise HalfplateError(
            f"calibration=self: {type(model).__name__} gives {logits.shape[1]} rows of logits for {current.shape[1]} tokens, so it cannot sample text; "
            "pass a text file with --calibration"
        )
    given = None if name is None else getattr(output, name, None)
    return logits[:, -1], cache if given is None else given
