"""What stands before the server of transformers: its key, its limits, the paths that are open, and the measurements.

An application of ASGI (https://asgi.readthedocs.io), so that it works with every server of transformers that is one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from typing import Any

from halfplate.serving.metrics import CONTENT_TYPE, Metrics
from halfplate.serving.settings import ServeSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HEALTH, METRICS, MODELS = "/health", "/metrics", "/v1/models"
# Paths that generate text, and the name of their limit of tokens. Others of transformers load and free models: they stay closed.
GENERATE = {"/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
USUAL_TOKENS = 1024  # of an answer whose request names no number
BODY_SECONDS = 60.0  # for a request to arrive
TAIL = 8192  # bytes of an answer that are searched for its usage
PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')


# What a value must be, in words and as a test; transformers would answer some of the others with an internal error.
VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number of at least 0", lambda value: _number(value) and value >= 0),
    "top_p": ("a number above 0 and at most 1", lambda value: _number(value) and 0 < value <= 1),
    "frequency_penalty": ("a number", lambda value: _number(value)),
    "seed": ("a whole number", lambda value: type(value) is int),
    "stop": ("a text or a list of texts", lambda value: isinstance(value, str) or _texts(value)),
    "stream": ("true or false", lambda value: isinstance(value, bool)),
    "prompt": ("a text", lambda value: isinstance(value, str)),
}


class Refused(Exception):
    """A request that is not passed on. status: of HTTP."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Guard:
    """`app` behind the key and the limits of `settings`."""

    def __init__(self, app: Application, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._in_flight = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        try:
            self._check_key(scope)
            if path == METRICS and method == "GET":
                await _answer(send, 200, self._metrics.text().encode(), {"content-type": CONTENT_TYPE})
            elif path in (HEALTH, MODELS) and method in ("GET", "OPTIONS"):
                await self._passed_on(scope, receive, send, path)
            elif path in GENERATE and method == "POST":
                await self._generated(scope, receive, send, path)
            elif path in (HEALTH, METRICS, MODELS, *GENERATE):
                raise Refused(405, f"{method} {path} is not answered")
            else:
                raise Refused(404, f"there is no {path}; expected {', '.join((*GENERATE, MODELS, HEALTH, METRICS))}")
        except Refused as refused:
            known = path if path in (HEALTH, METRICS, MODELS, *GENERATE) else "other"
            self._metrics.answered(known, refused.status, None, None)
            await _answer(
                send, refused.status, _error(refused), {"content-type": "application/json", **refused.headers}
            )

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        key = self._settings.key
        if key is None or scope["path"] == HEALTH:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise Refused(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
            )

    async def _generated(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, path: str) -> None:
        most = self._settings.max_requests
        if self._in_flight >= most:
            raise Refused(
                429,
                f"{most} requests run or wait, which is the limit (--max-requests); try again later",
                {"retry-after": "1"},
            )
        self._in_flight += 1
        self._metrics.began()
        try:
            body = _checked(await self._body(scope, receive), path, self._settings.max_tokens)
            await self._passed_on(scope, _again(body, receive), send, path)
        finally:
            self._in_flight -= 1
            self._metrics.ended()

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        most = self._settings.max_body
        too_large = Refused(
            413, f"the request is larger than {most} bytes, the limit (--max-body)", {"connection": "close"}
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(
                408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds", {"connection": "close"}
            ) from None

    async def _passed_on(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, path: str) -> None:
        """Let `app` answer, and measure it."""
        start, first, status, tail = perf_counter(), list[float](), 0, bytearray()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif body := message.get("body", b""):
                first.append(perf_counter() - start)
                del first[1:]
                tail.extend(body)
                del tail[:-TAIL]
            if status < 400:
                await send(message)
            elif message["type"] != "http.response.start" and not message.get("more_body", False):
                refused = Refused(status, _detail(bytes(tail)))
                await _answer(send, status, _error(refused), {"content-type": "application/json"})

        try:
            await self._app(scope, receive, seen)
        finally:
            text = path in GENERATE and status == 200
            seconds = perf_counter() - start if text else None
            counts = (_last(PROMPT, tail), _last(COMPLETION, tail)) if text else (0, 0)
            self._metrics.answered(path, status or 500, seconds, first[0] if text and first else None, *counts)


def _checked(body: bytes, path: str, most: int) -> bytes:
    """The body of a request whose number of tokens is within the limit; raises Refused for what is not such a request."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the request is a JSON {type(found).__name__}, expected an object")
    if "generation_config" in found:
        raise Refused(
            400,
            "generation_config is not accepted, because it goes past the limits of this server; send max_tokens, temperature and the like",
        )
    if path == "/v1/chat/completions":
        messages = found.get("messages")
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(one, dict) and "role" in one for one in messages)
        ):
            raise Refused(400, "messages is missing; expected a list of objects with role and content")
    for name, (words, fits) in VALUES.items():
        if found.get(name) is not None and not fits(found[name]):
            raise Refused(400, f"{name}={repr(found[name])[:80]}, expected {words}")
    for name in LIMITS:
        number = found.get(name)
        if number is None:
            continue
        if type(number) is not int or number < 1:
            raise Refused(400, f"{name}={number!r}, expected a whole number of at least 1")
        if number > most:
            raise Refused(400, f"{name}={number} exceeds {most}, the limit of this server (--max-tokens)")
    if all(found.get(name) is None for name in LIMITS):
        found[GENERATE[path]] = min(USUAL_TOKENS, most)
    return json.dumps(found).encode()


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the whole `body` once, and then what comes after it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return left.pop() if left else await receive()

    return received


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    listed.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": body})


def _error(refused: Refused) -> bytes:
    """The form of errors of the OpenAI API."""
    error = {"message": str(refused), "type": "invalid_request_error", "param": None, "code": refused.status}
    return json.dumps({"error": error}).encode()


def _detail(body: bytes) -> str:
    """The message of an error of the server, which has a form of its own."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
    return detail if isinstance(detail, str) else json.dumps(detail)


def _last(pattern: re.Pattern[bytes], tail: bytearray) -> int:
    found = pattern.findall(tail)
    return int(found[-1]) if found else 0
