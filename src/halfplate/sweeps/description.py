"""The content of a sweep file: the model, the evaluation, and the recipe of each row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from halfplate import plain_yaml
from halfplate.arguments import path_text, typed
from halfplate.compression.pruning import PruneFields
from halfplate.errors import HalfplateError
from halfplate.plain_text import cell
from halfplate.recipe import Recipe
from halfplate.recipe_values import file_values, laid_over
from halfplate.registry import available

VERSION = 1
ORIGINAL = "original"
KEYS = ("version", "model", "eval", "speed", "base", "rows")
RECIPE_KEYS = ("recipe", "activations", *(field.name for field in fields(Recipe)))
# Fields of a row that names a transform by `prune`, and is measured as the plain model that `halfplate prune` writes.
PRUNE = "prune"
PRUNE_KEYS = ("keep", *(name for name in PruneFields.__annotations__ if name != "transforms"))
# Fields of a recipe whose values are lists, which are not expanded.
LISTS = ("choose", "include", "exclude", "transforms", "types")
ACTIVATIONS = ("float", "int8")
EVALUATION: dict[str, Any] = {
    "text": tuple[str, ...],
    "tasks": tuple[str, ...],
    "seq_len": int,
    "windows": int,
    "tasks_folder": str,
    "limit": int,
    "threads": int,
}
SPEED: dict[str, Any] = {"prompt": int, "new_tokens": int, "rounds": int, "threads": int, "head_dtype": str}
MOST_ROWS = 1000
LONGEST_NAME = 120  # bytes
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row.

    recipe: None for the original model.
    activations: as in `halfplate.load`.
    pruned: whether only the transforms of the recipe are applied, and the result stays a plain model.
    """

    name: str
    recipe: Recipe | None
    activations: str = "float"
    pruned: bool = False


@dataclass(frozen=True)
class Sweep:
    """The model, the rows, and how each is measured.

    evaluation: arguments of `halfplate.evaluate`.
    speed: arguments of `halfplate.bench`, None if speed is not measured.
    """

    model: str
    evaluation: Mapping[str, Any]
    speed: Mapping[str, Any] | None
    rows: tuple[Row, ...]

    def chosen(self, only: list[str] | None) -> list[Row]:
        """The rows with these names, all if None; raises HalfplateError for an unknown name."""
        names = [row.name for row in self.rows]
        for name in only or []:
            if name not in names:
                raise HalfplateError(f"only={name!r} is not a row of the sweep; {available(name, names)}")
        return [row for row in self.rows if only is None or row.name in only]


def read_sweep(description: str | Path | Mapping[str, Any]) -> Sweep:
    """Read and check a sweep: a YAML file, or a mapping with its content; raises HalfplateError in one line if it is invalid."""
    if isinstance(description, Mapping):
        return _sweep(description)
    name = path_text("sweep", description)
    try:
        values = plain_yaml.read(name)
    except OSError as error:
        reason = error.strerror or error
        raise HalfplateError(f"sweep={name!r} cannot be read: {reason}; give the path of a YAML file") from None
    except ValueError as error:
        raise HalfplateError(f"sweep={name!r} is not valid YAML: {error}; see docs/sweeps.md for an example") from None
    try:
        return _sweep(values)
    except HalfplateError as error:
        raise HalfplateError(f"sweep={name!r}: {error}", docs=error.docs) from None


def _sweep(values: Any) -> Sweep:
    values = _mapping("the sweep", values, KEYS)
    if (version := values.get("version", VERSION)) != VERSION:
        raise HalfplateError(
            f"version={version!r} is unknown to this Halfplate; expected {VERSION}, try a newer Halfplate"
        )
    for key in ("model", "rows"):
        if key not in values:
            raise HalfplateError(f"{key} is missing; a sweep needs `model:` and `rows:`")
    rows = values["rows"]
    if not isinstance(rows, list):
        raise HalfplateError(f"rows is a {type(rows).__name__}, expected a list; begin every row with `- `")
    base = _recipe_values(_mapping("base", _empty_if_none(values.get("base")), RECIPE_KEYS))
    return Sweep(
        path_text("model", values["model"]),
        _options("eval", values.get("eval"), EVALUATION),
        _speed(values.get("speed")),
        _distinct([row for entry in rows for row in _rows_of(entry, base)]),
    )


def _speed(value: Any) -> dict[str, Any] | None:
    if isinstance(value, bool) or value is None:
        return {} if value else None
    return _options("speed", value, SPEED)


def _options(where: str, values: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Typed options; numbers must be at least 1, and a single text becomes a list."""
    found = {}
    for key, value in _mapping(where, _empty_if_none(values), tuple(hints)).items():
        if hints[key] == tuple[str, ...] and isinstance(value, str):
            value = [value]
        found[key] = typed(f"{where}: {key}", value, hints[key])
        if hints[key] is int and found[key] < 1:
            raise HalfplateError(f"{where}: {key}={value} is out of range; expected at least 1")
        if found[key] == ():
            raise HalfplateError(f"{where}: {key} is an empty list; name one, or leave it out")
    return found


def _empty_if_none(value: Any) -> Any:
    return {} if value is None else value


def _mapping(where: str, values: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise HalfplateError(
            f"{where} is a {type(values).__name__}, expected a mapping; write one `name: value` per line"
        )
    for key in values:
        if key not in known:
            raise HalfplateError(f"{where}: key {key!r} is unknown; {available(str(key), list(known))}")
    return values


def _recipe_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values on top of those of the recipe file that they name."""
    own = {key: value for key, value in values.items() if key != "recipe"}
    return laid_over(file_values(path_text("recipe", values["recipe"])), own) if "recipe" in values else own


def _rows_of(entry: Any, base: Mapping[str, Any]) -> Iterator[Row]:
    """The row of an entry, or its rows if a value is a list."""
    if entry == ORIGINAL:
        yield Row(ORIGINAL, None)
        return
    if isinstance(entry, str):
        entry = {"name": Path(entry).stem, "recipe": entry}
    where = f"row {entry['name']!r}" if isinstance(entry, Mapping) and "name" in entry else "a row"
    named = _mapping(where, entry, _keys(entry))
    name = _checked_name(named.get("name"), named)
    stated = _said_of(name, lambda: _recipe_values({key: value for key, value in named.items() if key != "name"}))
    for suffix, values in _said_of(name, lambda: _expanded(stated)):
        if PRUNE in values:
            yield _pruned_row(name + suffix, {key: base[key] for key in PRUNE_KEYS if key in base} | values)
        else:
            yield _row(name + suffix, laid_over(base, values))


def _keys(entry: Any) -> tuple[str, ...]:
    """The keys that a row may have."""
    pruned = isinstance(entry, Mapping) and PRUNE in entry
    return ("name", PRUNE, *PRUNE_KEYS) if pruned else ("name", PRUNE, *RECIPE_KEYS)


def _pruned_row(name: str, values: dict[str, Any]) -> Row:
    def made() -> Row:
        transform = values.pop(PRUNE)
        if not isinstance(transform, str):
            raise HalfplateError(
                f"prune={transform!r} is a {type(transform).__name__}, expected the name of a transform; try flap"
            )
        return Row(name, Recipe.of(transforms=(transform,), **values), pruned=True)

    return _said_of(name, made)


def _row(name: str, values: dict[str, Any]) -> Row:
    def made() -> Row:
        activations = values.pop("activations", "float")
        if activations not in ACTIVATIONS:
            raise HalfplateError(f"activations={activations!r} is not one of {', '.join(ACTIVATIONS)}")
        if values.get("max_kl") is not None:
            raise HalfplateError(
                f"max_kl={values['max_kl']} is not allowed in a sweep, which records every loss; leave it out"
            )
        return Row(name, Recipe.from_mapping(values), activations)

    return _said_of(name, made)


def _said_of(name: str, make: Callable[[], T]) -> T:
    """The result of `make`; its errors name the row."""
    try:
        return make()
    except HalfplateError as error:
        raise HalfplateError(f"row {name!r}: {error}", docs=error.docs) from None


def _expanded(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every combination of the values that are lists, with the addition to the name of the row."""
    options = values.get("method_options")
    places = [(None, key) for key, value in values.items() if isinstance(value, list) and key not in LISTS]
    lists = [values[key] for _, key in places]
    if isinstance(options, Mapping):
        inner = [key for key, value in options.items() if isinstance(value, list)]
        places += [("method_options", key) for key in inner]  # type: ignore[misc]
        lists += [options[key] for key in inner]
    for (_, key), choices in zip(places, lists, strict=True):
        if not choices:
            raise HalfplateError(f"{key} is an empty list; give values, or leave it out")
    if (count := math.prod(map(len, lists))) > MOST_ROWS:
        raise HalfplateError(f"its lists make {count:,} rows, expected at most {MOST_ROWS}; shorten them")
    found = []
    for chosen in product(*lists):
        made, suffix = dict(values), ""
        for (outer, key), value in zip(places, chosen, strict=True):
            if outer is None:
                made[key] = value
            else:
                made[outer] = {**made[outer], key: value}
            # Only the last part of a path, because row names become file names.
            said = value if isinstance(value, str) else json.dumps(value, default=str)
            suffix += f", {key} {said.rpartition('/')[2]}"
        found.append((suffix, made))
    return found


def _checked_name(name: Any, entry: Any) -> str:
    if name is None:
        raise HalfplateError(f"the row {cell(dict(entry))[:80]} has no name; add `name: `")
    if not isinstance(name, str):
        raise HalfplateError(f"name={name!r} of a row is a {type(name).__name__}, expected a text; put it in quotes")
    if name == ORIGINAL:
        raise HalfplateError(
            f"name={name!r} is reserved for the original model, the row `- {ORIGINAL}`; choose another name"
        )
    return name


def _distinct(rows: list[Row]) -> tuple[Row, ...]:
    """The rows; raises HalfplateError if there are none or too many, and for invalid or duplicate names."""
    if not rows:
        raise HalfplateError(f"rows is empty; expected at least one row, e.g. `- {ORIGINAL}`")
    if len(rows) > MOST_ROWS:
        raise HalfplateError(f"rows makes {len(rows):,} rows, expected at most {MOST_ROWS}; split the sweep")
    seen: set[str] = set()
    for row in rows:
        if (fault := _fault(row.name)) is not None:
            raise HalfplateError(f"name={row.name[:160]!r} of a row {fault}; its results are a file of that name")
        if row.name in seen:
            raise HalfplateError(f"name={row.name!r} is given to two rows; every row needs a name of its own")
        seen.add(row.name)
    return tuple(rows)


def _fault(name: str) -> str | None:
    """Why a name cannot be a file name, None if it can."""
    if not name.strip() or name != name.strip():
        return "is empty, or begins or ends with a space"
    if "/" in name or "\\" in name:
        return "has a path separator"
    if name.startswith("."):
        return "begins with a dot"
    if not name.isprintable():
        return "has characters that cannot be printed"
    if (length := len(name.encode())) > LONGEST_NAME:
        return f"has {length} bytes, expected at most {LONGEST_NAME}"
    return None
