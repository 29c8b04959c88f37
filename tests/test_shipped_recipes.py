"""Every recipe that comes with Halfplate runs, with little calibration, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfplate import recipes
from halfplate.checkpoint.read import inspect_checkpoint
from halfplate.cli import main

QUICK = ["--samples", "4", "--seq-len", "32", "--threads", "1", "--quiet"]
# What would take long on any model.
SHORTER = {
    "armor": ["--iterations", "5"],
    "fast": ["--iterations", "2", "--tune-block", "2"],
    "smallest-loss": ["--iterations", "2", "--tune-block", "2"],
    "smallest-file": ["--iterations", "2", "--tune-block", "2"],
}


@pytest.mark.parametrize("name", recipes.names())
def test_it_runs_by_its_name(name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "validate", name]) == 0
    assert main(["recipe", "show", name]) == 0
    out = tmp_path / "out"
    words = ["compress", str(tiny_folder), "-o", str(out), "--recipe", name, *QUICK, *SHORTER.get(name, [])]
    assert main(words) == 0, capsys.readouterr().err
    assert inspect_checkpoint(out, verify=True)["nbytes"] > 0


def test_a_name_that_is_none_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "validate", "smalest-loss"]) == 2
    assert "smallest-loss" in capsys.readouterr().err
    assert len(recipes.names()) == 16


def test_every_line_of_a_recipe_is_in_the_help() -> None:
    import halfplate.cli.recipe as verb

    source = Path(verb.__file__).read_text()
    assert all(name in source for name in recipes.names())
