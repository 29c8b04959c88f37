"""`halfplate serve` answers the `openai` client: streaming chat, and eight requests at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="openai is not installed (pip install 'halfplate[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'halfplate[serve]')")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def client(checkpoint: Path) -> Iterator[Any]:
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "halfplate", "serve", checkpoint, "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = checkpoint.parent / "server.txt"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0)
        assert server.poll() is None, log.read_text()
    finally:
        server.terminate()
        server.wait(60)


def test_streaming_chat_and_eight_at_once(client: Any, checkpoint: Path) -> None:
    def said(text: str) -> str:
        stream = client.chat.completions.create(
            model=str(checkpoint),
            messages=[{"role": "user", "content": text}],
            max_tokens=6,
            temperature=0,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    alone = said("A small bird")
    assert alone
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(said, ["A small bird"] * 8))
    assert together == [alone] * 8
    assert said("A small bird") == alone


def test_what_cannot_be_served_is_refused(halfplate: Callable[..., Any], tmp_path: Path, checkpoint: Path) -> None:
    halfplate("serve", tmp_path / "absent").refused("does not exist")
    halfplate("serve", checkpoint, "--port", 70000).refused("--port 70000 is not a port")
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    halfplate("serve", checkpoint).refused("damaged or cut short")
