"""Answering several requests of transformers' server at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _StreamError

from halfplate.errors import HalfplateError
from halfplate.models.arguments import cache_argument
from halfplate.models.context import positions
from halfplate.runtime.limits import check_generation
from halfplate.runtime.prompts import Sequenced
from halfplate.serving.metrics import Metrics
from halfplate.serving.reading import Reading
from halfplate.serving.request import Request, padded
from halfplate.serving.running import Running
from halfplate.serving.settings import ServeSettings

STOPPING = 10.0  # seconds that a token may take when the server is stopped
GATHERING = 0.01  # seconds that the first request of a batch waits for others
TEXT = {"input_ids", "attention_mask", "token_type_ids"}  # inputs of requests that can run together
OWN = ("max_new_tokens", "stop_strings", "transformers_version")  # settings in which requests of a batch may differ


class BatchManager(GenerateManager):  # type: ignore[misc]
    """The `GenerateManager` of a model that runs up to `max_batch` requests together.

    If the model decodes natively, requests join and leave between two tokens. With other models and with settings that `Running` does
    not know, those that differ only in their length and their stop texts run in one call of `generate`, and the others wait until it ends.
    Prompts are padded on the left, so an answer may differ by rounding from that of the same request alone.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        super().__init__()
        self._size, self._metrics, self._reading = settings.max_batch, metrics, Reading(settings, metrics)
        self._running = Running(self._reading)
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._model: Any = None
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="halfplate-batches", daemon=True)
        self._worker.start()

    def stop(self) -> None:
        """End all requests and the thread that runs them: a thread inside native code must not outlive the interpreter."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._worker.join(STOPPING)
        super().stop()

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
        tokenizer = getattr(processor, "tokenizer", processor)
        request = Request(inputs["input_ids"][0], settings, settings.max_new_tokens, tokenizer, said, done)
        with self._changed:
            self._model = model
            self._waiting.append(request)
            self._metrics.waiting(len(self._waiting))
            self._changed.notify()

    def _work(self) -> None:
        while not self._stopping:
            batch = self._next()
            # Any failure belongs to the requests that run; the server goes on.
            try:
                if batch and not self._joins(batch[0]):
                    self._run(batch)
                elif batch:
                    self._running.join(self._model, batch)
            except BaseException as error:
                _end(batch, error)
            try:
                if len(self._running):
                    self._running.step(self._model)
            except BaseException as error:
                self._running.end(error)
        stopped = HalfplateError("the server is being stopped; send the request again")
        self._running.end(stopped)
        _end([*self._waiting], stopped)

    def _joins(self, request: Request) -> bool:
        return self._running.takes(self._model, request.settings)

    def _next(self) -> list[Request]:
        """The waiting requests that begin now: those that can join the ones that run, or a batch for one call of `generate`."""
        with self._changed:
            if len(self._running) == 0:
                self._changed.wait_for(lambda: bool(self._waiting) or self._stopping)
                self._changed.wait_for(lambda: len(self._waiting) >= self._size or self._stopping, GATHERING)
            room, batch = self._size - len(self._running), list[Request]()
            if self._waiting and self._joins(self._waiting[0]):
                while self._waiting and len(batch) < room and self._joins(self._waiting[0]):
                    batch.append(self._waiting.popleft())
            elif self._waiting and len(self._running) == 0:
                first = _form(self._waiting[0].settings)
                batch = [request for request in self._waiting if _form(request.settings) == first][: self._size]
                self._waiting = deque(request for request in self._waiting if request not in batch)
            self._metrics.waiting(len(self._waiting))
        if batch:
            self._metrics.batch(len(batch))
        return batch

    def _run(self, batch: list[Request]) -> None:
        model, longest = self._model, max(len(request.ids) for request in batch)
        pad = batch[0].settings.pad_token_id
        pad = pad if pad is not None else next(iter(batch[0].ends), 0)
        prompts = [request.ids.cpu() for request in batch]
        ids, mask = (part.to(model.device) for part in padded(prompts, pad))
        settings = type(batch[0].settings).from_dict(batch[0].settings.to_dict())
        settings.max_new_tokens, settings.stop_strings = max(request.most for request in batch), None
        settings.pad_token_id = pad
        rows = StoppingCriteriaList([_Rows(batch)])
        cache = self._reading.begin(model, settings, prompts)
        own = {} if cache is None else {cache_argument(model.forward): cache}
        if cache is not None:
            settings.cache_implementation = None
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=rows, **own
            )
        for row, request in enumerate(batch):
            if cache is not None:
                self._reading.keep(Sequenced(cache, row, longest - len(request.ids)), request.text)
            request.end(request.tokens)


class _Left(Exception):
    """The client has left."""


class _Rows(StoppingCriteria):
    """Hands each new token to its request, and ends the rows of requests that are over."""

    def __init__(self, batch: list[Request]) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for request, token in zip(self._batch, input_ids[:, -1].tolist(), strict=True):
            if not request.ended:
                request.take(token)
        return torch.tensor([request.ended for request in self._batch], dtype=torch.bool, device=input_ids.device)


def _end(batch: list[Request], error: BaseException) -> None:
    for request in batch:
        request.end(error)


def _one(token: int) -> Tensor:
    return torch.tensor([token], dtype=torch.int64, device="cpu")


def _form(settings: Any) -> dict[str, Any]:
    """All settings in which requests of a batch must agree."""
    return {key: value for key, value in settings.to_dict().items() if key not in OWN}


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
