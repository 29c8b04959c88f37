"""The models whose rows are measured, the texts that they are calibrated on and those that they are judged by."""

import gzip
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common import CACHE, DATA, SHARED, smollm2_gguf

from halfplate.calibration import read_text

HELD_OUT = 200  # last documents of C4 and of TinyStories, which nothing is calibrated or trained on
CHECKPOINTS = CACHE / "checkpoints"


@dataclass(frozen=True)
class Judged:
    """A text that models are judged by: the first `windows` of the documents' one stream."""

    documents: Callable[[], list[str]]
    windows: int


@dataclass(frozen=True)
class Subject:
    """A dense model. texts: judged by, by name; `valid` is for choices. seq_len: of a window. calibration: `text` and `c4`.

    field: what its calibration text is. block: of ARMOR's wrappers. reported: the text of the pictures and ratios.
    on_a_grid: what is to be said of its weights.
    """

    name: str
    title: str
    source: Callable[[], Path]
    seq_len: int
    texts: Mapping[str, Judged]
    calibration: Mapping[str, Callable[[], Path]]
    field: str
    block: int
    recovery_minutes: float
    reported: str = "test"
    reported_text: str = "WikiText-2 test"
    on_a_grid: str = ""

    def calibration_source(self, name: str) -> str:
        """What `--calibration` takes for a text by its name here."""
        return name if name == "self" else str(self.calibration[name]())


def wikitext(split: str) -> Callable[[], list[str]]:
    return lambda: read_text(str(DATA / "wikitext2" / f"{split}.jsonl.gz"))


def held_out(file: str) -> Callable[[], list[str]]:
    return lambda: read_text(str(DATA / file))[-HELD_OUT:]


def all_but_held_out(file: str) -> Callable[[], Path]:
    """A copy of the file without the documents that judge."""

    def source() -> Path:
        path = CACHE / "texts" / file.replace("/", "_")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{os.getpid()}.{path.name}")
            with gzip.open(new, "wt", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"text": text}) + "\n" for text in read_text(str(DATA / file))[:-HELD_OUT])
            new.replace(path)
        return path

    return source


C4, STORIES = "c4/train_1000.jsonl.gz", "tinystories/train_sample.jsonl.gz"

SUBJECTS = {
    "smollm2": Subject(
        "smollm2",
        "SmolLM2-135M-Instruct",
        smollm2_gguf,
        1024,
        {
            "test": Judged(wikitext("test"), 16),
            "valid": Judged(wikitext("valid"), 8),
            "c4": Judged(held_out(C4), 8),
        },
        {"text": lambda: DATA / "wikitext2" / "train_1MB.txt.gz", "c4": all_but_held_out(C4)},
        "WikiText-2 train",
        16,
        30,
        on_a_grid=(
            "**SmolLM2-135M-Instruct comes from a Q4_1 file, so its weights lie on a 4-bit grid of groups of 32 already: that flatters every 4-bit row**, "
            "above all those whose groups are of 32 (llama.cpp's) or 64; stories260K below is a clean fp32 model."
        ),
    ),
    "stories260K": Subject(
        "stories260K",
        "stories260K",
        lambda: SHARED / "models" / "stories260K",
        256,
        {
            "stories": Judged(held_out(STORIES), 64),
            "test": Judged(wikitext("test"), 64),
            "valid": Judged(wikitext("valid"), 32),
            "c4": Judged(held_out(C4), 32),
        },
        {"text": all_but_held_out(STORIES), "c4": all_but_held_out(C4)},
        "TinyStories",
        4,  # blocks of 16 are half as large as its matrices of 64 columns
        3,
        "stories",
        "TinyStories",
        "stories260K has matrices of 64 and 172 columns: wrappers weigh more in it than in any real model, and K-quants of llama.cpp fall back everywhere. Some rows of the tasks are longer than its context of 512 tokens of few letters, so it is not scored on them.",
    ),
}
