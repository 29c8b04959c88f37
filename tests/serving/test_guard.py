"""The guard before the server: key, limits, paths and measurements, with an application that only records what reaches it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from halfplate.errors import HalfplateError
from halfplate.serving.guard import Guard
from halfplate.serving.metrics import Metrics
from halfplate.serving.settings import ServeSettings, found_key

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class App:
    """Answers every request with a usage, after `gate` is open."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(json.loads(message["body"]) if message["body"] else None)
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'data: {"text": "x"}\n\n', "more_body": True})
        usage = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 5}}'
        await send({"type": "http.response.body", "body": usage})


async def ask(
    guard: Guard,
    path: str = CHAT,
    body: Any = HELLO,
    method: str = "POST",
    key: str | None = None,
    pieces: int = 1,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer; the body of the request comes in so many pieces."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = -(-len(content) // pieces) or 1
    left = [content[start : start + step] for start in range(0, max(len(content), 1), step)]
    sent: list[Any] = []

    async def receive() -> Any:
        part = left.pop(0) if left else b""
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    named = headers | ({} if key is None else {"authorization": key})
    listed = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
    await guard({"type": "http", "path": path, "method": method, "headers": listed}, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message["body"] for message in sent[1:])


def guarded(**fields: Any) -> tuple[App, Guard, Metrics]:
    app, metrics = App(), Metrics()
    return app, Guard(app, ServeSettings("m", **fields), metrics), metrics


def test_the_key_opens_everything_but_health() -> None:
    async def run() -> None:
        _, guard, metrics = guarded(key="secret")
        for key in (None, "secret", "Bearer secre", "Bearer secret ", "Bearer sécret"):
            status, headers, body = await ask(guard, key=key)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert b"secret" not in body
        assert (await ask(guard, key="Bearer secret"))[0] == 200
        assert (await ask(guard, "/metrics", b"", "GET"))[0] == 401
        assert (await ask(guard, "/health", b"", "GET"))[0] == 200
        assert (await ask(guard, "/metrics", b"", "GET", key="Bearer secret"))[0] == 200
        assert 'halfplate_requests_total{path="/v1/chat/completions",status="401"} 5' in metrics.text()

    asyncio.run(run())


@pytest.mark.parametrize("pieces", [1, 3])
def test_large_requests_are_refused(pieces: int) -> None:
    async def run() -> None:
        app, guard, _ = guarded(max_body=100)
        large = {"messages": [{"role": "user", "content": "a" * 100}]}
        assert (await ask(guard, body=large, pieces=pieces))[0] == 413
        assert (await ask(guard, content_length="101"))[0] == 413
        assert app.bodies == []
        assert (await ask(guard, pieces=pieces))[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, b"{", "is not JSON"),
        (CHAT, b"[" * 100_000, "is not JSON"),
        (CHAT, [1], "is a JSON list, expected an object"),
        (CHAT, {}, "messages is missing"),
        (CHAT, {"messages": ["hello"]}, "messages is missing"),
        (CHAT, HELLO | {"max_tokens": 11}, "max_tokens=11 exceeds 10, the limit of this server"),
        (CHAT, HELLO | {"max_completion_tokens": 11}, "max_completion_tokens=11 exceeds 10"),
        (CHAT, HELLO | {"max_tokens": True}, "max_tokens=True, expected a whole number"),
        (CHAT, HELLO | {"max_tokens": 0}, "max_tokens=0, expected"),
        (CHAT, HELLO | {"generation_config": "{}"}, "generation_config is not accepted"),
        (CHAT, HELLO | {"temperature": "hot"}, "temperature='hot', expected a number of at least 0"),
        (CHAT, HELLO | {"temperature": -1}, "temperature=-1, expected"),
        (CHAT, HELLO | {"top_p": 2}, "top_p=2, expected"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt=['a', 'b'], expected a text"),
        (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop=[1], expected"),
    ],
)
def test_what_is_not_such_a_request_is_refused(path: str, body: Any, words: str) -> None:
    async def run() -> None:
        app, guard, _ = guarded(max_tokens=10)
        status, _, answer = await ask(guard, path, body)
        assert status == 400
        assert words in json.loads(answer)["error"]["message"]
        assert app.bodies == []

    asyncio.run(run())


def test_the_number_of_tokens_is_always_limited() -> None:
    async def run() -> None:
        app, guard, _ = guarded(max_tokens=10)
        await ask(guard)
        await ask(guard, "/v1/responses", {"input": "a"})
        await ask(guard, body=HELLO | {"max_tokens": 3})
        assert [body.get("max_tokens") or body.get("max_output_tokens") for body in app.bodies] == [10, 10, 3]

    asyncio.run(run())


def test_errors_of_the_server_have_the_form_of_the_api() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 422, "headers": [(b"content-length", b"17")]})
        await send({"type": "http.response.body", "body": b'{"detail":', "more_body": True})
        await send({"type": "http.response.body", "body": b'"wrong"}'})

    status, headers, body = asyncio.run(ask(Guard(failing, ServeSettings("m"), Metrics())))
    assert status == 422
    assert json.loads(body)["error"]["message"] == "wrong"
    assert headers["content-length"] == str(len(body))


def test_paths_that_load_models_are_closed() -> None:
    async def run() -> None:
        app, guard, _ = guarded()
        for path in ("/load_model", "/reset", "/docs", "/v1/audio/transcriptions", "/v1/systemone"):
            assert (await ask(guard, path))[0] == 404
        assert (await ask(guard, CHAT, b"", "GET"))[0] == 405
        assert app.bodies == []

    asyncio.run(run())


def test_too_many_requests_and_what_is_measured() -> None:
    async def run() -> None:
        app, guard, metrics = guarded(max_requests=2)
        app.gate.clear()
        running = [asyncio.create_task(ask(guard)) for _ in range(2)]
        await asyncio.sleep(0)
        while len(app.bodies) < 2:
            await asyncio.sleep(0.001)
        assert "halfplate_requests_in_flight 2" in metrics.text()
        status, headers, _ = await ask(guard)
        assert (status, headers["retry-after"]) == (429, "1")
        app.gate.set()
        assert [answer[0] for answer in await asyncio.gather(*running)] == [200, 200]
        text = metrics.text()
        for line in (
            "halfplate_requests_in_flight 0",
            'halfplate_requests_total{path="/v1/chat/completions",status="200"} 2',
            'halfplate_requests_total{path="/v1/chat/completions",status="429"} 1',
            'halfplate_tokens_total{kind="prompt"} 6',
            'halfplate_tokens_total{kind="completion"} 10',
            'halfplate_request_seconds_bucket{le="+Inf"} 2',
            "halfplate_first_byte_seconds_count 2",
        ):
            assert line in text.splitlines(), line
        assert (await ask(guard))[0] == 200

    asyncio.run(run())


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert found_key(None, {}) is None
    assert found_key(None, {"HALFPLATE_API_KEY": "from-environment"}) == "from-environment"
    assert found_key(str(file), {"HALFPLATE_API_KEY": "other"}) == "from-file"
    assert "from-file" not in repr(ServeSettings("m", key="from-file"))
    for content in ("", "\n", "two words", "two\nlines", "a" * 5000):
        file.write_text(content)
        with pytest.raises(HalfplateError, match="holds no key; expected one line"):
            found_key(str(file), {})
    file.write_bytes(b"\xff")
    with pytest.raises(HalfplateError, match="cannot be read"):
        found_key(str(file), {})
    for other in (tmp_path, tmp_path / "absent"):
        with pytest.raises(HalfplateError, match="is not a file"):
            found_key(str(other), {})
    with pytest.raises(HalfplateError, match="HALFPLATE_API_KEY holds no key"):
        found_key(None, {"HALFPLATE_API_KEY": ""})


def test_settings_out_of_range() -> None:
    for fields in ({"max_tokens": 0}, {"max_body": 0}, {"max_requests": 0}, {"max_batch": 0}):
        with pytest.raises(HalfplateError, match="is out of range; expected at least 1"):
            ServeSettings("m", **fields)
    assert ServeSettings("m", host="0.0.0.0").open_to_others
    assert not ServeSettings("m").open_to_others
