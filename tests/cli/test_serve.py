"""`halfplate serve` answers the `openai` client: streaming chat, and eight requests at once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from halfplate.recipe import Recipe

openai = pytest.importorskip("openai", reason="openai is not installed (pip install 'halfplate[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'halfplate[serve]')")

INT8 = Recipe(method="rtn", pattern="dense", block_size=0, core_dtype="int8", group_size=16)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def server(
    compressed_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The address and the model of a server with a key and small limits."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(compressed_once(INT8), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "halfplate", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-tokens", "40", "--max-body", "20KB", "--max-requests", "16"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HALFPLATE_API_KEY": KEY}
    log = folder.parent / "server.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", folder
        assert process.poll() is None, log.read_text()
        assert KEY not in log.read_text()
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def client(server: tuple[str, Path]) -> Any:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, timeout=300, max_retries=0)


def said(client: Any, folder: Path, text: str, stream: bool = True, **options: Any) -> str:
    arguments = {"max_tokens": 6, "temperature": 0} | options
    messages = [{"role": "user", "content": text}]
    if not stream:
        answer = client.chat.completions.create(model=str(folder), messages=messages, **arguments)
        return str(answer.choices[0].message.content)
    chunks = client.chat.completions.create(model=str(folder), messages=messages, stream=True, **arguments)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def measured(server: tuple[str, Path]) -> dict[str, float]:
    request = urllib.request.Request(f"{server[0]}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def measured_after(server: tuple[str, Path], more: int, before: dict[str, float]) -> dict[str, float]:
    """The measurements once `more` chats have been recorded: that happens after the client has their last byte."""
    name, end = 'halfplate_requests_total{path="/v1/chat/completions",status="200"}', time.monotonic() + 60
    while (found := measured(server)).get(name, 0) - before.get(name, 0) < more:
        assert time.monotonic() < end, (
            f"{found.get(name, 0)} chats are recorded, expected {more} more than {before.get(name, 0)}"
        )
        time.sleep(0.05)
    return found


def test_streaming_chat_and_eight_at_once(client: Any, server: tuple[str, Path]) -> None:
    folder = server[1]
    first = measured(server)
    alone = said(client, folder, "A small bird")
    assert alone
    before = measured_after(server, 1, first)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: said(client, folder, "A small bird"), range(8)))
    assert together == [alone] * 8
    # Streams leave out the beginning of a character that is not complete at the end.
    assert said(client, folder, "A small bird", stream=False).startswith(alone)
    after = measured_after(server, 9, before)
    assert after["halfplate_batched_requests_total"] - before["halfplate_batched_requests_total"] == 9
    assert after["halfplate_batches_total"] - before["halfplate_batches_total"] < 9
    assert (
        after['halfplate_tokens_total{kind="completion"}'] - before['halfplate_tokens_total{kind="completion"}'] == 54
    )


def test_requests_of_a_batch_have_their_own_lengths_and_stops(client: Any, server: tuple[str, Path]) -> None:
    folder = server[1]
    asked = [("A small bird", {"max_tokens": 3}), ("Tom and Mia", {"max_tokens": 24}), ("They saw", {"max_tokens": 12})]
    alone = [said(client, folder, text, **options) for text, options in asked]
    stop = alone[1][4:7]
    asked.append(("Tom and Mia", {"max_tokens": 24, "stop": [stop]}))
    alone.append(said(client, folder, *asked[-1][:1], **asked[-1][1]))
    assert len(alone[3]) < len(alone[1])
    assert stop in alone[3]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: said(client, folder, one[0], **one[1]), asked))
    assert together == alone


def test_a_client_that_leaves_does_not_stop_the_others(client: Any, server: tuple[str, Path]) -> None:
    folder = server[1]
    alone = said(client, folder, "They saw", max_tokens=20)
    messages = [{"role": "user", "content": "A small bird"}]
    leaving = client.chat.completions.create(
        model=str(folder), messages=messages, max_tokens=40, temperature=0, stream=True
    )
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(said, client, folder, "They saw", max_tokens=20)
        next(iter(leaving))
        leaving.close()
        assert other.result() == alone


def test_the_other_endpoints(client: Any, server: tuple[str, Path]) -> None:
    folder = str(server[1])
    alone = client.completions.create(model=folder, prompt="A small bird", max_tokens=5, temperature=0)
    assert alone.usage.completion_tokens == 5
    answer = client.responses.create(
        model=folder, input="A small bird", max_output_tokens=4, temperature=0, stream=False
    )
    assert answer.usage.output_tokens == 4


def test_wrong_requests(client: Any, server: tuple[str, Path]) -> None:
    address, folder = server
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        said(openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0), folder, "A")
    with pytest.raises(openai.APIStatusError, match="larger than 20000 bytes") as large:
        said(client, folder, "a" * 30_000)
    assert large.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="max_tokens=41 exceeds 40"):
        said(client, folder, "A", max_tokens=41)
    with pytest.raises(openai.BadRequestError, match=r"the prompt has .* tokens, and the model has 128 positions"):
        said(client, folder, "bird " * 1000)
    with pytest.raises(openai.BadRequestError, match="Server is pinned"):
        said(client, Path("another"), "A")
    assert client.models.list() is not None
    assert said(client, folder, "A small bird")


@pytest.mark.parametrize("activations", ["auto", "float", "int8"])
def test_the_server_packs_models_for_the_activations_asked_for(
    compressed_once: Callable[..., Path], activations: str
) -> None:
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM

    import halfplate
    from halfplate.kernels.linear import taken_activations
    from halfplate.runtime import explain
    from halfplate.serving.server import _take_activations

    folder = compressed_once(Recipe(method="magnitude", core_dtype="int8", samples=4, seq_len=32, threads=1))
    manager = SimpleNamespace(_load_model=lambda name: AutoModelForCausalLM.from_pretrained(name))
    _take_activations(manager, activations)
    found = str(explain(manager._load_model(folder)))
    assert found == str(explain(halfplate.load(folder, activations=activations)))
    assert ("int8 activations" in found) == ("native" in found and taken_activations(activations) != "float")


def test_what_cannot_be_served_is_refused(halfplate: Callable[..., Any], tmp_path: Path, checkpoint: Path) -> None:
    halfplate("serve", tmp_path / "absent").refused("does not exist")
    halfplate("serve", checkpoint, "--api-key", "secret").refused("--api-key")
    halfplate("serve", checkpoint, "--api-key-file", tmp_path / "absent").refused("is not a file")
    halfplate("serve", checkpoint, "--max-body", "big").refused("'big' is not a size")
    halfplate("serve", checkpoint, "--prompt-cache", "big").refused("--prompt-cache='big' is not a size")
    halfplate("serve", checkpoint, "--cache-dtype", "fp8").refused("--cache-dtype", "fp32", "bf16", "int8")
    halfplate("serve", checkpoint, "--activations", "half").refused("--activations", "auto", "float", "int8")
    halfplate("serve", checkpoint, "--port", 70000).refused("--port 70000 is not a port")
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    halfplate("serve", checkpoint).refused("damaged or cut short")
