"""The records of the rows of a sweep, one JSON file each, and whether they are still valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfplate.calibration.documents import split_fields
from halfplate.calibration.mixture import parts_of
from halfplate.checkpoint.folder import replace_file
from halfplate.json_numbers import finite
from halfplate.planning import foreign_packages
from halfplate.sweeps.description import Row, Sweep

VERSION = 1
DONE, FAILED, COMPRESSED, TO_DO = "done", "failed", "compressed", "to do"
SHOWN = ("weight_nbytes", "share", "linear_share", "evaluation")  # entries of a finished row that tables need


@dataclass(frozen=True)
class Standing:
    """The state of a row before a sweep continues.

    status: one of the four above.
    why: in words, empty if done.
    record: the valid part of its record, {} if there is none.
    """

    status: str
    why: str
    record: dict[str, Any]


def made_of(sweep: Sweep, row: Row, model: str) -> dict[str, Any]:
    """Everything that determines the measurements of a row, as plain JSON. A record with another value is stale. model: `Source.sha256`."""
    texts = {text: {"sha256": _content(text)} for text in sweep.evaluation.get("text", ())}
    made: dict[str, Any] = {
        "model": {"sha256": model},
        "eval": {**sweep.evaluation, "texts": texts},
        "speed": sweep.speed,
    }
    if row.recipe is not None:
        made["recipe"] = row.recipe.fingerprint_json()
        made["activations"] = row.activations
        if row.pruned:
            made["pruned"] = True  # a recipe with these transforms could also go on to compress
        sources = [part.source for part in parts_of(row.recipe.calibration)]
        # One text has its hash here, as in the records of earlier versions.
        made["calibration"] = (
            {"sha256": _content(sources[0])} if len(sources) == 1 else {name: _content(name) for name in sources}
        )
        made |= foreign_packages(row.recipe)
    plain: dict[str, Any] = json.loads(json.dumps(made))
    return plain


def standing(file: Path, made: Mapping[str, Any]) -> Standing:
    """The state of the row with the record `file`, whose measurements are determined by `made`."""
    record = _read(file)
    if record is None:
        return Standing(TO_DO, "its record is damaged" if file.exists() else "not measured yet", {})
    if (change := difference(record["made"], made)) is not None:
        return Standing(TO_DO, change, {})
    status = record["status"]
    why = {DONE: "", FAILED: str(record.get("error"))}.get(status, "compressed, not measured yet")
    return Standing(status, why, record)


def save(file: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a row atomically."""
    replace_file(file, json.dumps(finite({"version": VERSION, **record}), indent=1, allow_nan=False) + "\n")


def difference(kept: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str | None:
    """The first difference between two rows in words; None if they are equal."""
    for key in sorted(kept.keys() | now.keys()):
        before, after = kept.get(key), now.get(key)
        if before == after:
            continue
        if key == "sha256":
            return f"the content of {where} changed"
        name = f"{where} {key}".strip()
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            return difference(before, after, name)
        return f"{name} was {_short(before)} and is {_short(after)} now"
    return None


def _read(file: Path) -> dict[str, Any] | None:
    """The record in `file`; None if there is none, or if another version wrote it."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = (
        isinstance(record, dict)
        and record.get("version") == VERSION
        and isinstance(record.get("made"), dict)
        and record.get("status") in (DONE, FAILED, COMPRESSED)
        and (record["status"] != DONE or record.keys() >= set(SHOWN))
    )
    return record if whole else None


def _content(source: str) -> str | None:
    """The SHA-256 of a text file; None if it is not a file."""
    path = Path(split_fields(source)[0]).expanduser()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def _short(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
