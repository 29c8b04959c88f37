"""A conversation with any model: its history, streamed answers, and what fits into its context."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from halfplate.calibration.documents import check_unicode
from halfplate.calibration.vocabulary import check_tokens
from halfplate.checkpoint.loading import load_any
from halfplate.errors import HalfplateError
from halfplate.models.context import positions
from halfplate.runtime import explain, greedy
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.limits import check_generation
from halfplate.runtime.prompts import check_cache_dtype, new_cache, why_no_prompts

# Share of the context that is kept free for an answer, if fewer tokens than an answer may have are left.
FREE_SHARE = 4
UNFINISHED = "\ufffd"  # what a decoded text ends in while the bytes of its last character are incomplete


@dataclass(frozen=True)
class Answer:
    """An answer and how it was made.

    tokens: number of generated tokens.
    read: tokens of the prompt that were read for it, without those kept from the turns before.
    context: tokens of prompt and answer together.
    dropped: turns that were dropped because the context was full.
    ended: `end` (the model ended it), `stopped` (by the user), or `length`.
    first_seconds: until the first token; seconds: of all tokens after it.
    """

    text: str
    tokens: int
    read: int
    context: int
    dropped: int
    ended: str
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding, without the first token; None for fewer than two tokens."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class _Stopped(Exception):
    """The user stopped the answer."""


@dataclass
class Conversation:
    """The turns with one model, from the oldest that the model still sees.

    model, tokenizer: as `checkpoint.loading.load_any` returns them.
    most: largest number of tokens of an answer.
    cache_dtype: of keys and values, if the model decodes natively. lookup: as in `runtime.greedy`.
    Without a chat template, the model continues the text of all turns.
    """

    name: str
    model: Any
    tokenizer: Any
    most: int = 512
    cache_dtype: torch.dtype = torch.float32
    lookup: int = 0
    turns: list[tuple[str, str]] = field(default_factory=list)
    last: Answer | None = None
    _cache: GrowingCache | None = None
    _held: list[int] = field(default_factory=list)  # tokens of the cache

    @classmethod
    def with_model(
        cls,
        name: str,
        most: int = 512,
        activations: str = "auto",
        cache_dtype: str = "fp32",
        lookup: int = 0,
        fit: int | str | None = None,
    ) -> Conversation:
        """Load the model `name`, or what fits in `fit` bytes of it, for a conversation; raises HalfplateError on bad input."""
        model, tokenizer = load_any(name, activations=activations, fit=fit)
        return cls(name, model, tokenizer, most, check_cache_dtype(model, cache_dtype), lookup)

    @property
    def has_template(self) -> bool:
        """Whether turns are formatted by the chat template of the model."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def limit(self) -> int | None:
        """The positions of the model, if it has a limit."""
        return positions(self.model)

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self.last = [], None
        self._forget()

    def answer(self, message: str, say: Callable[[str], None], stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Answer `message` greedily, and keep both as a turn.

        say: called with each piece of the answer as soon as it is complete text.
        stopped: asked after each token; if it returns True, the answer ends and what there is of it is kept.
        Raises HalfplateError if the message alone exceeds the context; the turns stay as they were.
        """
        check_unicode(message, "message")
        ids, dropped = self._prompt(message)
        limit = self.limit
        new_tokens = self.most if limit is None else min(self.most, limit - len(ids))
        check_tokens(torch.tensor(ids, dtype=torch.int64, device="cpu"), self.model, "message", self.tokenizer)
        check_generation(self.model.config, len(ids), new_tokens)
        stream = _Stream(self.tokenizer, say, stopped)
        read = len(ids) - self._keep(ids)
        start = time.perf_counter()
        stop_ids = self._stop_ids()
        try:
            prompt = torch.tensor([ids], dtype=torch.int64, device="cpu")
            cache = self._cache if self._cache is not None else self._own_cache()
            greedy(self.model, prompt, new_tokens, stop_ids, stream.add, cache, lookup=self.lookup)
            ended = "end" if stream.tokens and stream.tokens[-1] in stop_ids else "length"
        except _Stopped:
            ended = "stopped"
        except BaseException:
            self._forget()  # layers of the cache may differ in length
            raise
        stream.finish()
        if self._cache is not None:
            self._held = (ids + stream.tokens)[: self._cache.get_seq_length()]
        first = stream.times[0] - start if stream.times else 0.0
        seconds = stream.times[-1] - stream.times[0] if stream.times else 0.0
        context, count = len(ids) + len(stream.tokens), len(stream.tokens)
        self.last = Answer(stream.text, count, read, context, dropped, ended, first, seconds)
        self.turns = [*self.turns[dropped:], (message, stream.text)]
        return self.last

    def paths(self) -> str:
        """Which kernels the linears use, and how the model decodes, one line each."""
        return str(explain(self.model))

    def _prompt(self, message: str) -> tuple[list[int], int]:
        """The tokens of the turns and `message`, and how many of the oldest turns were left out to make them fit."""
        limit = self.limit
        most = None if limit is None else limit - min(self.most, max(1, limit // FREE_SHARE))
        for dropped in range(len(self.turns) + 1):
            ids = self._ids(self.turns[dropped:], message)
            if most is None or len(ids) <= most:
                break
        if not ids:
            raise HalfplateError("message has no tokens; write some text")
        if limit is not None and len(ids) >= limit:
            raise HalfplateError(
                f"message has {len(ids)} tokens, and {self.name!r} has {limit} positions; write a shorter one"
            )
        return ids, dropped

    def _ids(self, turns: list[tuple[str, str]], message: str) -> list[int]:
        if not self.has_template:
            text = "\n".join([*(said + answered for said, answered in turns), message])
            return list(self.tokenizer(text)["input_ids"])
        messages = []
        for said, answered in turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": message})
        try:
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        # A template is a program of its author, and can raise any exception.
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise HalfplateError(
                f"the chat template of {self.name!r} fails ({reason}); use halfplate generate"
            ) from error
        return list(encoded["input_ids"])

    def _stop_ids(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _keep(self, ids: list[int]) -> int:
        """Cut the cache to the tokens that begin `ids`, without the last one, which is read again; returns their number."""
        if self._cache is None:
            if why_no_prompts(self.model) is None:
                self._cache = new_cache(self.model, self.cache_dtype)
            return 0
        same = next(
            (place for place, pair in enumerate(zip(self._held, ids, strict=False)) if pair[0] != pair[1]), None
        )
        kept = min(len(self._held) if same is None else same, len(ids) - 1)
        if kept < len(self._held):
            self._cache.crop(kept - len(self._held))
        self._held = self._held[:kept]
        return kept

    def _own_cache(self) -> GrowingCache | None:
        """A cache for one answer, if the type of keys and values was chosen and no cache can be kept; `greedy` makes its own for None."""
        return None if self.cache_dtype == torch.float32 else new_cache(self.model, self.cache_dtype)

    def _forget(self) -> None:
        self._cache, self._held = None, []


class _Stream:
    """Passes on new text as soon as its characters are complete."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        self._tokenizer, self._say, self._stopped = tokenizer, say, stopped
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.text = ""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        text = self._decoded()
        if not text.endswith(UNFINISHED):
            self._pass_on(text)
        if self._stopped():
            raise _Stopped

    def finish(self) -> None:
        self._pass_on(self._decoded())

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        return text

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.text):
            self._say(text[len(self.text) :])
            self.text = text
