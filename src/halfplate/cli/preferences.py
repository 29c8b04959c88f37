"""`--prefer`: one word instead of the options of a format."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from halfplate.recipe import Recipe

SIZE, SPEED = "size", "speed"
LEAST_SHARE = 0.5  # of the decoder's parameters; if fewer fit the format of a preference, `size` is taken


@dataclass(frozen=True)
class Preference:
    """What a word stands for. recipe: a built-in recipe. why: the reason for it, in one line."""

    recipe: str
    why: str


PREFERENCES = {
    "quality": Preference("near-original", "int8 everywhere: hardly an answer changes, at about 0.53 of bf16"),
    SIZE: Preference(
        "everyday", "four bits, and five where they help most, lose least at 0.36 of bf16, embedding included"
    ),
    SPEED: Preference(
        "fast", "2:4 cores in four bits are read and multiplied fastest; recovery makes up for a part of the loss"
    ),
}


@dataclass(frozen=True)
class Choice:
    """What chose the format. word: a preference, None for a recipe or options. fallback: why another word was not taken."""

    word: str | None
    what: str
    fallback: str | None = None

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The rows of `plan`: the choice, and why."""
        if self.word is None:
            return [("choice", self.what)]
        preference = PREFERENCES[self.word]
        rows = [("choice", f"{self.what}, recipe {preference.recipe}"), ("why", preference.why)]
        return rows if self.fallback is None else [*rows, ("why not as asked", self.fallback)]


def chosen(args: argparse.Namespace, changes: Mapping[str, Any]) -> tuple[Choice, Recipe]:
    """The choice and the recipe of `--prefer`, `--recipe` or neither, overridden by `changes`.

    Raises HalfplateError for both of them, and for options that contradict them.
    """
    from halfplate.recipe import Recipe
    from halfplate.recipe_values import chooses_format

    if args.prefer is None:
        recipe = Recipe.of(args.recipe, **changes)
        if args.recipe is not None:
            return Choice(None, f"recipe {args.recipe}"), recipe
        if chooses_format(changes):
            return Choice(None, "your options"), recipe
        return Choice(SIZE, "size, the default"), recipe
    if args.recipe is not None:
        raise HalfplateError(
            f"--prefer {args.prefer} and --recipe {args.recipe} both choose the format; leave one of them out"
        )
    return Choice(args.prefer, f"--prefer {args.prefer}"), _preferred(args.prefer, changes)


def _preferred(word: str, changes: Mapping[str, Any]) -> Recipe:
    from halfplate.recipe import Recipe
    from halfplate.recipe_values import EVERYDAY_CHOICE

    if changes.get("budget") is not None and word != SPEED:
        # As in the default: a budget does not prune what is to be kept.
        changes = {"choose": EVERYDAY_CHOICE} | dict(changes)
    try:
        return Recipe.of(PREFERENCES[word].recipe, **changes)
    except HalfplateError as error:
        raise HalfplateError(f"--prefer {word}: {error}") from error


def fitted(
    args: argparse.Namespace, choice: Choice, recipe: Recipe, changes: Mapping[str, Any]
) -> tuple[Choice, Recipe]:
    """The same, or `size` if too little of the model fits the 2:4 cores of `speed`."""
    if choice.word != SPEED:
        return choice, recipe
    import halfplate

    pattern = recipe.parsed_pattern
    reason = f"2:4 needs widths that are multiples of {pattern.m}, and "
    try:
        share = halfplate.plan(args.model, recipe).decoder_share
        reason += f"only {share:.0%} of the decoder has them"
    except HalfplateError as error:
        if "divides no d_in" not in str(error):
            raise
        share, reason = 0.0, f"{reason}no matrix has them"
    if share >= LEAST_SHARE:
        return choice, recipe
    what = f"size instead of {choice.what}"
    return Choice(SIZE, what, reason), _preferred(SIZE, changes)


def rows_of(choice: Choice, minutes: float) -> list[tuple[str, str]]:
    """The rows of `plan` about the choice, and about the recovery at the end."""
    if not minutes:
        return choice.rows
    what = (
        f"{minutes:g} min of training towards the original at the end, with both models in memory (--recover 0: none)"
    )
    return [*choice.rows, ("recovery", what)]
