"""The verdict at the end of `compress`, `recover` and `eval`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from halfplate.recipe import Recipe


def verdict_on(
    measures: Mapping[str, Any], model: str, folder: str, recipe: Recipe | None = None
) -> dict[str, Any] | None:
    """The entry `verdict` of the JSON output of a command; None if `measures` have no KL.

    model: the original.
    folder: what was judged, a checkpoint or any other model.
    recipe: None for that in the record of the checkpoint.
    """
    from halfplate.checkpoint.config import read_record
    from halfplate.evaluation.verdict import verdict_of
    from halfplate.models.sources import is_compressed
    from halfplate.recipe import Recipe

    ours = is_compressed(folder)
    if ours and recipe is None:
        # A checkpoint of another program has no record.
        with suppress(HalfplateError):
            recipe = Recipe.from_record(read_record(Path(folder)).get("recipe"))
    verdict = verdict_of(measures, recipe, model, folder if ours else None)
    return None if verdict is None else verdict.to_json()


def print_verdict(verdict: Mapping[str, Any], text: str) -> None:
    """Print the figures and the verdict, each on a line. text: what was read for the figures."""
    print(f"quality, {text}: {verdict['figures']}")
    print(f"verdict: {verdict['sentence']}")
