"""The checkpoint of every method has its report, and the report the command that makes the checkpoint again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from halfplate.cli import build_parser
from halfplate.cli.recipe_options import recipe_from
from halfplate.compression.compress import compress
from halfplate.methods import METHODS
from halfplate.recipe import Recipe
from halfplate.report.command import compress_command

QUICK = {"armor": {"iterations": 1}, "denoiserotator": {"steps": 1}, "gqsa": {"share": 0.4}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_report(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        method=method,
        method_options=QUICK.get(method, {}),
        core_dtype="bf16" if METHODS.get(method).sparse or METHODS.get(method).coreless else "int8",
        samples=2,
        seq_len=16,
        threads=1,
    )
    summary = compress(str(tiny_folder), tmp_path / "out", recipe)
    assert "report_error" not in summary
    assert (tmp_path / "out" / "report.html").is_file()
    words = shlex.split(compress_command("M", "OUT", recipe))
    assert recipe_from(build_parser().parse_args(words[1:])) == recipe
