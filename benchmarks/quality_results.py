"""What has been measured of the rows of one model: one committed JSON file, without paths and host names."""

import fcntl
import json
import os
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from common import CACHE, ROOT

from halfplate.version import package_version

FOLDER = ROOT / "benchmarks" / "results"


class Results:
    """Entries by label, each `{"made": ..., "compression": ..., "quality": ..., "tasks": ..., "decode": ..., "refused": ...}`.

    `made` is what the row is (`quality_rows.described`); every other key is one stage with its measures, its `protocol` and
    its `stamp`. A row whose `made` has changed, or a stage whose protocol has, is stale and counts as not measured.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> dict[str, Any]:
        """All that the file holds."""
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}

    def stage(self, label: str, stage: str, made: Mapping[str, Any], protocol: Any = None) -> dict[str, Any] | None:
        """The measures of a stage, or None where there are none that still hold. protocol: None where any will do."""
        entry = self.entries().get(label)
        if entry is None or not unchanged(entry["made"], made) or stage not in entry:
            return None
        found: dict[str, Any] = entry[stage]
        return found if protocol is None or found.get("protocol") == plain(protocol) else None

    def save(self, label: str, stage: str, made: Mapping[str, Any], measures: Mapping[str, Any], protocol: Any) -> None:
        """Keep the measures of a stage, and drop what was measured of the row when it was another."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        # Two runs may measure two parts of one table.
        with (CACHE / f"{self._path.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self.entries()
            entry = entries.get(label)
            if entry is None or not unchanged(entry["made"], made):
                entry = {}
            if stage != "refused":
                entry.pop("refused", None)
            entry["made"] = made
            entry[stage] = {"protocol": protocol, "stamp": stamp()} | dict(measures)
            entries[label] = entry
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(plain(entries), indent=1, sort_keys=True) + "\n", encoding="utf-8")
            new.replace(self._path)


def unchanged(kept: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a row is still what it was, as far as both say.

    A field of recipes that has come or gone since changes nothing unless the row states it; its default is how things
    were done without it.
    """
    kept, now = plain(kept), plain(now)
    if "recipe" not in kept or "recipe" not in now:
        parents = [one.get("parent") for one in (kept, now)]
        if not all(isinstance(parent, dict) for parent in parents):
            return bool(kept == now)
        rest = [{key: value for key, value in one.items() if key != "parent"} for one in (kept, now)]
        return rest[0] == rest[1] and unchanged(*parents)
    old, new = kept["recipe"], now["recipe"]
    return kept["stated"] == now["stated"] and all(new[key] == old[key] for key in old.keys() & new.keys())


def plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def stamp() -> dict[str, Any]:
    """What measured: version and commit; `+` where the working tree differs from it."""
    return {"version": package_version(), "commit": commit(), "load": [round(one, 1) for one in os.getloadavg()]}


def without_paths(message: str) -> str:
    """A message with only the last part of every path in it."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", message)


@cache  # the code of a process is that of its start
def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src")
        return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
