"""What a recipe is optimised for: size or speed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfplate.recipe import Recipe


def kernels(target: str, without: str | None) -> str:
    """Which matrices no kernel runs. without: those of Halfplate; they do not matter if another program runs the result."""
    if target != "halfplate":
        return f"those of {target}, after an export"
    return without or "every matrix has one"


def served(recipe: "Recipe") -> str:
    """One line: what the format of `recipe` is optimised for, and which options optimise for the other."""
    from halfplate.formats.quantizers import QUANTIZERS

    if recipe.budgeted:
        return (
            "least loss within the size (docs/budget.md)"
            if recipe.asks_size
            else "least loss within the budget (docs/choosing.md)"
        )
    if recipe.parsed_pattern.is_dense:
        return "size; for speed: --pattern 2:4 (docs/choosing.md)"
    if recipe.core_dtype in QUANTIZERS:
        return "speed; at the same bytes, --pattern dense with more bits loses less (docs/choosing.md)"
    return "speed (float weights); for size: --pattern dense --core-dtype int4 (docs/choosing.md)"
