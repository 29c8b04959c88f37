"""A sweep of three quick rows on the tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

SENTENCES = "The small bird sat in the big tree near the house, and it wanted to play with the red ball. "


def describe(model: Path, text: Path) -> dict[str, Any]:
    """What a sweep file of the original and two recipes holds."""
    text.write_text(SENTENCES * 20)
    return {
        "model": str(model),
        "eval": {"text": str(text), "seq_len": 16, "windows": 4},
        "base": {"method": "wanda", "samples": 2, "seq_len": 16, "calibration": str(text)},
        "rows": ["original", {"name": "wanda"}, {"name": "rounded", "method": "rtn", "core_dtype": "int4"}],
    }


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """The text of `description`."""
    return tmp_path / "story.txt"


@pytest.fixture
def description(tiny_folder_once: Path, text_file: Path) -> dict[str, Any]:
    """A sweep that is not begun."""
    return describe(tiny_folder_once, text_file)


@pytest.fixture(scope="module")
def finished_once(tiny_folder_once: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A sweep that is done, with its checkpoints, and its folder, to read."""
    import halfplate

    folder = tmp_path_factory.mktemp("finished")
    description = describe(tiny_folder_once, folder / "story.txt")
    halfplate.sweep(description, folder / "out", keep=True)
    return description, folder / "out"


@pytest.fixture
def finished(finished_once: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The same with a copy of its folder to change."""
    description, out = finished_once
    return description, Path(shutil.copytree(out, tmp_path / "finished"))
