"""The rows of the local tasks, from the folder that HALFPLATE_TASK_DATA names."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets


def rows(file: str) -> dict[str, Any]:
    """The one split, `test`, of a .jsonl.gz file below the folder."""
    folder = os.environ.get("HALFPLATE_TASK_DATA")
    if folder is None:
        raise FileNotFoundError("HALFPLATE_TASK_DATA is not set; let it name the folder that holds " + file)
    with gzip.open(Path(folder) / file, "rt", encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def piqa(**_: Any) -> dict[str, Any]:
    return rows("piqa/valid.jsonl.gz")


def arc_easy(**_: Any) -> dict[str, Any]:
    return rows("arc_easy/test.jsonl.gz")


def openbookqa(**_: Any) -> dict[str, Any]:
    return rows("openbookqa/test.jsonl.gz")


def hellaswag(**_: Any) -> dict[str, Any]:
    return rows("hellaswag/val_1000_exact.jsonl.gz")
