"""The plain values of recipe files, before a Recipe checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypedDict

from halfplate import plain_yaml, recipes
from halfplate.effort import Effort
from halfplate.errors import HalfplateError

DEFAULT_METHOD = "armor"
EVERYDAY = "everyday"  # the built-in recipe for those who choose no format
EVERYDAY_CHOICE = ("core_dtype",)  # what a budget may vary in it
# The built-in recipe whose formats a target holds, for those who choose no format.
OF_TARGET = {"gguf": "gguf-q4", "vllm": "vllm-w4", "gptq": "vllm-w4", "mlx": "mlx-w4"}
SIZES = ("fit", "fit_ram")  # with one of them, a field that chooses a format is laid over a built-in recipe
# Fields, and options of the method, that choose a format; the rest of it then has the defaults of Recipe.
FORMAT = {"method", "pattern", "block_size", "out_block_size", "share_wrappers", "core_dtype", "wrapper_dtype"}
FORMAT |= {"time_budget", "choose", "search", "ratios"}
FORMAT_OPTIONS = {"solver", "objective"}


class RecipeFields(TypedDict, total=False):
    """The fields of Recipe as keyword arguments of a function."""

    method: str
    method_options: Mapping[str, Any]
    pattern: str
    block_size: int | Literal["auto"]
    out_block_size: int | None
    share_wrappers: bool
    core_dtype: str
    wrapper_dtype: str
    types: tuple[str, ...]
    group_size: int
    embedding_dtype: str
    head_dtype: str
    transforms: tuple[str, ...]
    keep: float | None
    calibration: str | tuple[str, ...]
    effort: Effort
    samples: int
    seq_len: int
    seed: int
    inputs: Literal["dense", "compressed"]
    cross_damping: float | Literal["none"]
    token_limit: float | Literal["none"]
    expert_tokens: Literal["equal", "gated"]
    precision: Literal["auto", "bf16", "fp32"]
    tune_block: int
    ratios: str
    owl_lambda: float
    budget: float | None
    time_budget: float | None
    fit: int | None
    fit_ram: int | None
    context: int
    target: str
    choose: tuple[str, ...]
    search: Literal["knapsack", "evolution"]
    generations: int
    offspring: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    device: str
    threads: int | None
    max_kl: float | None


def without_recipe(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over a built-in recipe, or `changes` alone if one of them chooses a format.

    The recipe is that of the target, `everyday` without one. A size or a target alone leaves open what the format is.
    """
    target = changes.get("target")
    sized = any(changes.get(name) is not None for name in SIZES)
    if chooses_format(changes) and not sized and target not in OF_TARGET:
        return dict(changes)
    chosen = {"choose": EVERYDAY_CHOICE} if sized or changes.get("budget") is not None else {}
    return laid_over(file_values(OF_TARGET.get(str(target), EVERYDAY)) | chosen, changes)


def chooses_format(changes: Mapping[str, Any]) -> bool:
    """Whether one of `changes` chooses a format, so that the others have the defaults of Recipe."""
    options = changes.get("method_options", {})
    return bool(FORMAT & changes.keys() or (isinstance(options, Mapping) and FORMAT_OPTIONS & options.keys()))


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Override the values of `below` by those of `above`. Options of the method are added to those below, unless the method changes.

    A `core_dtype` above replaces all types below.
    """
    if "core_dtype" in above and "types" not in above:
        below = {name: value for name, value in below.items() if name != "types"}  # one type is asked for
    method = below.get("method", DEFAULT_METHOD)
    kept = below.get("method_options", {}) if above.get("method", method) == method else {}
    added = above.get("method_options", {})
    if not isinstance(kept, Mapping) or not isinstance(added, Mapping):
        # Recipe refuses it.
        return {**below, **above, "method_options": added if isinstance(kept, Mapping) else kept}
    return {**below, **above, "method_options": {**kept, **added}}


def file_values(path: str | Path) -> dict[str, Any]:
    """The plain values in a recipe file, or in a built-in recipe by its name; raises HalfplateError if it is not a YAML mapping."""
    try:
        values = plain_yaml.read(recipes.shipped(str(path)) or path)
    except OSError as error:
        raise HalfplateError(
            f"recipe={str(path)!r} cannot be read: {error.strerror or error}; give the path of a YAML file or one of {', '.join(recipes.names())}"
        ) from None
    except ValueError as error:
        raise HalfplateError(
            f"recipe={str(path)!r} is not valid YAML: {error}; write one `name: value` per line"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise HalfplateError(
            f"recipe={str(path)!r} holds a {type(values).__name__}, expected a mapping; write one `name: value` per line"
        )
    return values


def types_in(entries: Sequence[str]) -> list[tuple[str, int | None]]:
    """The core_dtype of each entry `PATTERN=TYPE` or `PATTERN=TYPE:COLUMNS`, and its columns that share a scale, None for those of the recipe.

    Raises HalfplateError for an entry of another form.
    """
    found = []
    for entry in entries:
        pattern, equals, core = entry.partition("=")
        core_dtype, colon, columns = core.partition(":")
        if not (pattern and equals and core_dtype) or (colon and not (columns.isascii() and columns.isdigit())):
            raise HalfplateError(
                f"types={entry!r} is not of the form PATTERN=TYPE or PATTERN=TYPE:COLUMNS; try '*.down_proj=nl5' or '*.down_proj=int6k:16'"
            )
        found.append((core_dtype, int(columns) if colon else None))
    return found


def typed_by(entries: Sequence[str], name: str) -> tuple[str, int | None] | None:
    """What `types_in` gives of the first entry whose pattern matches `name`; None if there is none."""
    matching = (core for entry, core in zip(entries, types_in(entries), strict=True) if _matches(entry, name))
    return next(matching, None)


def _matches(entry: str, name: str) -> bool:
    return fnmatchcase(name, entry.partition("=")[0])
