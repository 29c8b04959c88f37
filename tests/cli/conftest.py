"""Running the command line in-process on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from halfplate.cli import main

SENTENCES = (
    "The small bird sat in the big tree near the house, and it wanted to play with the red ball. "
    "Tom and Mia were happy; in 2024 they came home, and then they slept all day long. "
)


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line gave."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, *parts: str, status: int = 2) -> None:
        """Assert that it was refused in one line of standard error that holds all `parts`."""
        assert (self.status, self.out) == (status, ""), self
        lines = [line for line in self.err.splitlines() if line.startswith("halfplate: error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        for part in parts:
            assert part in lines[0]


@pytest.fixture
def halfplate(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`halfplate("plan", folder, ...)` runs the verb and captures what it prints."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text long enough for a few windows of 32 tokens."""
    path = tmp_path / "story.txt"
    path.write_text(SENTENCES * 30, encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(checkpoint_once: Path, tmp_path: Path) -> Path:
    """The tiny model compressed by Wanda."""
    return Path(shutil.copytree(checkpoint_once, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def checkpoint_once(tiny_folder_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It once for all tests, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    text, out = folder / "story.txt", folder / "checkpoint"
    text.write_text(SENTENCES * 30, encoding="utf-8")
    assert main(["compress", str(tiny_folder_once), "-o", str(out), *WANDA, "--calibration", str(text)]) == 0
    return out


WANDA = ("--method", "wanda", "--samples", "4", "--seq-len", "32", "--threads", "1")
