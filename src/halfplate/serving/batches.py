"""Answering several requests of transformers' server in one call of `generate`."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _StreamError
from transformers.generation.stopping_criteria import StopStringCriteria

from halfplate.errors import HalfplateError
from halfplate.models.arguments import cache_argument
from halfplate.models.context import positions
from halfplate.runtime.limits import check_generation
from halfplate.serving.metrics import Metrics
from halfplate.serving.reading import Reading
from halfplate.serving.settings import ServeSettings

GATHERING = 0.01  # seconds that the first request of a batch waits for others
TEXT = {"input_ids", "attention_mask", "token_type_ids"}  # inputs of requests that can run together
OWN = ("max_new_tokens", "stop_strings", "transformers_version")  # settings in which requests of a batch may differ


@dataclass(eq=False)
class _Request:
    """A request that waits or runs.

    ids: int64 (prompt,). most: tokens of the answer at most.
    said: called with each token; done: with the tokens of the answer, or with the exception that ended the batch.
    """

    ids: Tensor
    settings: Any
    most: int
    said: Callable[[int], None]
    done: Callable[[list[int] | BaseException], object]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


class BatchManager(GenerateManager):  # type: ignore[misc]
    """The `GenerateManager` of a model that runs up to `max_batch` waiting requests together, if they differ only in their length and their stop texts.

    The others wait until the batch has ended. Prompts are padded on the left, so an answer may differ by rounding from that of the same request alone.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        super().__init__()
        self._size, self._metrics, self._reading = settings.max_batch, metrics, Reading(settings, metrics)
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._model: Any = None
        self._tokenizer: Any = None
        threading.Thread(target=self._work, name="halfplate-batches", daemon=True).start()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        """As in the base class."""
        if not set(inputs) <= TEXT:
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        _check_length(model, inputs, gen_config)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = DirectStreamer(tokenizer, loop, queue, response_parser=response_parser)
        streamer.put(inputs["input_ids"])  # it leaves out the prompt

        def done(found: list[int] | BaseException) -> None:
            if isinstance(found, BaseException):
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(" ".join(str(found).split())))
            elif not streamer._cancelled.is_set():
                streamer.end()

        self._add(model, processor, inputs, gen_config, lambda token: streamer.put(_one(token)), done)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """As in the base class."""
        if not set(inputs) <= TEXT:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        _check_length(model, inputs, gen_config)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[int]] = loop.create_future()

        def set_result(found: list[int] | BaseException) -> None:
            if future.done():  # the client has left
                return
            if isinstance(found, BaseException):
                future.set_exception(found)
            else:
                future.set_result(found)

        def said(_: int) -> None:
            if future.cancelled():
                raise _Left

        self._add(
            model, processor, inputs, gen_config, said, lambda found: loop.call_soon_threadsafe(set_result, found)
        )
        tokens = await future
        text = processor.decode(tokens, skip_special_tokens=True)
        return text, inputs["input_ids"].shape[-1], torch.tensor(tokens, dtype=torch.int64, device="cpu")

    def _add(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        settings: Any,
        said: Callable[[int], None],
        done: Callable[[list[int] | BaseException], object],
    ) -> None:
        request = _Request(inputs["input_ids"][0], settings, settings.max_new_tokens, said, done)
        with self._changed:
            self._model, self._tokenizer = model, getattr(processor, "tokenizer", processor)
            self._waiting.append(request)
            self._metrics.waiting(len(self._waiting))
            self._changed.notify()

    def _work(self) -> None:
        while True:
            batch = self._next()
            try:
                self._run(batch)
                found: list[list[int] | BaseException] = [request.tokens for request in batch]
            # Any failure belongs to the requests of the batch; the server goes on.
            except BaseException as error:
                found = [error] * len(batch)
            for request, result in zip(batch, found, strict=True):
                if not request.ended:
                    request.done(result)

    def _next(self) -> list[_Request]:
        """The first waiting request and those that can run with it, as soon as there is one."""
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            self._changed.wait_for(lambda: len(self._waiting) >= self._size, GATHERING)
            first = _form(self._waiting[0].settings)
            batch = [request for request in self._waiting if _form(request.settings) == first][: self._size]
            self._waiting = deque(request for request in self._waiting if request not in batch)
            self._metrics.waiting(len(self._waiting))
        self._metrics.batch(len(batch))
        return batch

    def _run(self, batch: list[_Request]) -> None:
        model, longest = self._model, max(len(request.ids) for request in batch)
        ends = _ends(batch[0].settings)
        pad = batch[0].settings.pad_token_id
        pad = pad if pad is not None else next(iter(ends), 0)
        ids = torch.full((len(batch), longest), pad, dtype=torch.int64, device=model.device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.ids) :] = request.ids
            mask[row, longest - len(request.ids) :] = 1
        settings = type(batch[0].settings).from_dict(batch[0].settings.to_dict())
        settings.max_new_tokens, settings.stop_strings = max(request.most for request in batch), None
        settings.pad_token_id = pad
        rows = StoppingCriteriaList([_Rows(batch, ends, self._tokenizer, longest)])
        prompts = [request.ids.cpu() for request in batch]
        cache = self._reading.begin(model, settings, prompts)
        own = {} if cache is None else {cache_argument(model.forward): cache}
        if cache is not None:
            settings.cache_implementation = None
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=rows, **own
            )
        if cache is not None:
            self._reading.keep(cache, prompts, [request.tokens for request in batch])


class _Left(Exception):
    """The client has left."""


class _Rows(StoppingCriteria):
    """Hands each new token to its request, and ends the rows of requests that are over."""

    def __init__(self, batch: list[_Request], ends: set[int], tokenizer: Any, prompt: int) -> None:
        self._batch, self._ends, self._prompt = batch, ends, prompt
        self._stops = [
            StopStringCriteria(tokenizer, request.settings.stop_strings) if request.settings.stop_strings else None
            for request in batch
        ]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, (request, token) in enumerate(zip(self._batch, input_ids[:, -1].tolist(), strict=True)):
            if not request.ended:
                self._take(row, request, token, input_ids)
        over = [request.ended for request in self._batch]
        return torch.tensor(over, dtype=torch.bool, device=input_ids.device)

    def _take(self, row: int, request: _Request, token: int, input_ids: Tensor) -> None:
        request.tokens.append(token)
        try:
            request.said(token)
        # A streamer raises an exception of its own if its client has left.
        except Exception:
            request.ended = True
            request.done([])
            return
        stop = self._stops[row]
        stopped = stop is not None and bool(stop(input_ids[row : row + 1, self._prompt :], None)[0])
        if token in self._ends or len(request.tokens) >= request.most or stopped:
            request.ended = True
            request.done(request.tokens)


def _one(token: int) -> Tensor:
    return torch.tensor([token], dtype=torch.int64, device="cpu")


def _form(settings: Any) -> dict[str, Any]:
    """All settings in which requests of a batch must agree."""
    return {key: value for key, value in settings.to_dict().items() if key not in OWN}


def _ends(settings: Any) -> set[int]:
    ends = settings.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _check_length(model: Any, inputs: Any, settings: Any) -> None:
    """Raise an HTTP error 400 unless prompt and answer fit into the context and the memory."""
    from fastapi import HTTPException

    prompt, new = inputs["input_ids"].shape[-1], settings.max_new_tokens
    longest = positions(model)
    if longest is not None and longest < prompt + 1:
        raise HTTPException(400, f"the prompt has {prompt} tokens, and the model has {longest} positions")
    if longest is not None:
        settings.max_new_tokens = new = min(new, longest - prompt)
    try:
        check_generation(model.config, prompt, new, "max_tokens")
    except HalfplateError as error:
        raise HTTPException(400, str(error)) from None
