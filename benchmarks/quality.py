"""Quality of every method: the sweeps benchmarks/quality_MODEL.yaml, whose tables go into RESULTS.md.

    python benchmarks/quality.py stories260K                     minutes
    python benchmarks/quality.py smollm2 --only original armor   some rows; all of them take days on two cores

Models and texts are put under the names that the sweep files use into benchmarks/cache/quality, and the results into
benchmarks/cache/quality/MODEL.results: a row that is done is not measured again. benchmarks/common.py says where models and data are
looked for. The last HELD_OUT documents of C4 and of TinyStories judge, and nothing is calibrated on them.
"""

import argparse
import gzip
import json
import os
import shutil
from pathlib import Path

from common import CACHE, DATA, ROOT, SHARED, smollm2_gguf, tell_rows, write_section
from off_grid import make_off_grid

import halfplate
from halfplate.calibration import read_text
from halfplate.cli.console import silence_libraries
from halfplate.sweeps.results import PICTURE_FILE, TABLE_FILE

HELD_OUT = 200


def off_grid() -> Path:
    """The folder of SmolLM2 off the grid, made if it is not there."""
    folder = CACHE / "off_grid"
    if not folder.exists():
        make_off_grid(str(smollm2_gguf()), folder)
    return folder


MODELS = {
    "smollm2": ("SmolLM2-135M.gguf", smollm2_gguf),
    "off_grid": ("SmolLM2-off-grid", off_grid),
    "stories260K": ("stories260K", SHARED / "models" / "stories260K"),
}
LINKED = {
    "wikitext2_train.txt.gz": "wikitext2/train_1MB.txt.gz",
    "wikitext2_test.jsonl.gz": "wikitext2/test.jsonl.gz",
    "wikitext2_valid.jsonl.gz": "wikitext2/valid.jsonl.gz",
}
DIVIDED = {"c4": "c4/train_1000.jsonl.gz", "tinystories": "tinystories/train_sample.jsonl.gz"}
WHAT = "Rows of `{file}`, by `python benchmarks/quality.py {model}`; {texts}; {machine}."


def prepare(model: str, folder: Path) -> None:
    """Put the model and all texts into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    name, source = MODELS[model]
    _link(folder / name, source if isinstance(source, Path) else source())
    for text, file in LINKED.items():
        _link(folder / text, DATA / file)
    for text, file in DIVIDED.items():
        documents = read_text(str(DATA / file))
        _write(folder / f"{text}_calibration.jsonl.gz", documents[:-HELD_OUT])
        _write(folder / f"{text}_held_out.jsonl.gz", documents[-HELD_OUT:])
    _write(folder / "mixed_calibration.jsonl.gz", _mixed(folder))


def _mixed(folder: Path) -> list[str]:
    """As many characters of C4 as of WikiText-2, then WikiText-2: calibrated on one text, a model forgets others sooner."""
    wikitext = read_text(str(folder / "wikitext2_train.txt.gz"))
    left, mixed = sum(map(len, wikitext)), []
    for document in read_text(str(folder / "c4_calibration.jsonl.gz")):
        if left > 0:
            mixed.append(document)
            left -= len(document)
    return mixed + wikitext


def _link(place: Path, target: Path) -> None:
    if not target.exists():
        raise SystemExit(f"{target} is missing; HALFPLATE_SHARED names the folder with data and models")
    place.unlink(missing_ok=True)
    place.symlink_to(target.resolve())


def _write(place: Path, documents: list[str]) -> None:
    # Without a time in it, so that the same documents are the same bytes: sweeps compare them.
    with place.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as lines:
        lines.writelines(json.dumps({"text": text}).encode() + b"\n" for text in documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only the rows of these names")
    options = parser.parse_args()
    silence_libraries()
    folder, file = CACHE / "quality", f"benchmarks/quality_{options.model}.yaml"
    prepare(options.model, folder)
    os.chdir(folder)  # sweep files name what is there
    out = Path(f"{options.model}.results")
    result = halfplate.sweep(ROOT / file, out, options.only, report=tell_rows)
    done = [row for row in result["rows"] if row["status"] == "done"]
    texts = ", ".join(f"{name} {score['windows']} windows" for name, score in done[0]["evaluation"]["texts"].items())
    picture = f"docs/pictures/quality_sweep_{options.model}.svg"
    if (out / PICTURE_FILE).exists():  # not for one row alone
        shutil.copyfile(out / PICTURE_FILE, ROOT / picture)
    what = WHAT.format(file=file, model=options.model, texts=texts, machine=done[-1]["machine"].partition(", load")[0])
    table = (out / TABLE_FILE).read_text(encoding="utf-8").strip()
    write_section(f"sweep_{options.model}", f"{what}\n\n{table}\n\n![KL against bytes]({picture})")


if __name__ == "__main__":
    main()
