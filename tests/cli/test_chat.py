"""`halfplate chat` in a pseudo terminal, as a user sees it."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halfplate.cli import chat
from halfplate.evaluation.conversation import Conversation

SECONDS = 60
PROMPT = "\n> "


def _owning_terminal() -> None:
    """Make standard input the terminal that Ctrl-C comes from."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A program in a pseudo terminal. seen: everything that it printed, with plain line ends."""

    def __init__(self, *arguments: object) -> None:
        self._end, theirs = pty.openpty()
        command = [sys.executable, "-m", "halfplate", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "dumb"},  # fewer control sequences of readline
            start_new_session=True,
            preexec_fn=_owning_terminal,
        )
        os.close(theirs)
        self.seen = ""

    def read_until(self, end: str) -> str:
        """What is printed from now on, up to and with `end`."""
        start, deadline = len(self.seen), time.monotonic() + SECONDS
        while end not in self.seen[start:]:
            ready, _, _ = select.select([self._end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {end!r} after {self.seen!r}"
            try:
                read = os.read(self._end, 4096)
            except OSError:  # the program has ended
                read = b""
            assert read, f"ended before {end!r}: {self.seen!r}"
            self.seen += read.decode().replace("\r\n", "\n")
        return self.seen[start:]

    def type(self, text: str, until: str = PROMPT) -> str:
        """What is printed after `text` was typed, up to the next prompt."""
        os.write(self._end, text.encode())
        return self.read_until(until)

    def interrupt(self) -> str:
        """What is printed after Ctrl-C was typed at the prompt; typed again if it came before readline waits for keys."""
        for _ in range(SECONDS):
            os.write(self._end, b"\x03")
            if select.select([self._end], [], [], 1)[0]:
                break
        return self.read_until(PROMPT)

    def close(self) -> int:
        """Send Ctrl-D; returns the exit status."""
        os.write(self._end, b"\x04")
        return self.process.wait(SECONDS)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()


def test_a_conversation_in_a_terminal(terminal: Callable[..., Terminal], checkpoint: Path, tiny_folder: Path) -> None:
    talk = terminal(checkpoint, "--against", tiny_folder, "--max-new-tokens", "4")
    greeting = talk.read_until(PROMPT)
    assert greeting.count("has no chat template, so it continues your text") == 2
    assert "Ctrl-D ends" in greeting
    answers = talk.type("Tom and Mia\n")
    assert answers.index(f"[{checkpoint}]") < answers.index(f"[{tiny_folder}]")
    assert "no chat template" not in answers
    stats = talk.type("/stats\n")
    assert stats.count("last answer: ") == 2
    assert stats.count(" of 128 tokens in 1 turn\n") == 2
    assert stats.count("decoding: ") == 2
    assert "is forgotten" in talk.type("/reset\n")
    assert "no answer yet" in talk.type("/stats\n")
    assert "/exit" in talk.type("/help\n")
    assert "(/halt is not a command" in talk.type("/halt\n")
    assert "(message has " in talk.type("Tom saw the bird. " * 60 + "\n")
    assert "(Ctrl-D or /exit ends)" in talk.interrupt()
    assert talk.close() == 0


@pytest.mark.slow
def test_exit_ends_it(terminal: Callable[..., Terminal], tiny_folder: Path) -> None:
    talk = terminal(tiny_folder)
    talk.read_until(PROMPT)
    talk.type("/exit\n", "/exit\n")
    assert talk.process.wait(SECONDS) == 0


def test_without_a_terminal_generate_is_named(halfplate: Callable[..., Any], tiny_folder: Path) -> None:
    halfplate("chat", tiny_folder).refused("needs a terminal", "halfplate generate")


def test_ctrl_c_stops_the_answer_alone(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation.with_model(str(tiny_folder), 30)
    before = signal.getsignal(signal.SIGINT)
    add = chat.visible

    def interrupted(piece: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return str(add(piece))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "visible", interrupted)
        chat._answer(talk, "Tom")
    assert capsys.readouterr().out.endswith("\n(stopped)\n")
    assert talk.last is not None
    assert talk.last.tokens < 30
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_leaves_the_turn_out(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any, **more: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    talk = Conversation.with_model(str(tiny_folder), 30)
    monkeypatch.setattr("halfplate.evaluation.conversation.greedy", slow)
    chat._answer(talk, "Tom")
    assert "this turn is forgotten" in capsys.readouterr().out
    assert talk.turns == []


def test_what_the_answer_lacks_is_said(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation.with_model(str(tiny_folder), 12)
    said = []
    for _ in range(8):
        chat._answer(talk, "Tom and Mia saw the small bird")
        said.append(capsys.readouterr().out)
    assert any("(the context is full: the oldest turn was dropped)" in text for text in said)
    assert any("(cut at --max-new-tokens 12)" in text for text in said)
