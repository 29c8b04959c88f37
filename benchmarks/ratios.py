"""Measure the rules that let layers keep unequal shares: KL at equal bytes, in one table.

    python benchmarks/ratios.py -o FOLDER        a few minutes on one core

stories260K is pruned to 5:16 (69 % of the weights go), by magnitude, wanda and sparsegpt, calibrated and judged on TinyStories. The spreads of
`owl` and `farms` are --owl-lambda 0.08 and 0.15. FOLDER keeps a line of JSON for each finished row, so a second call continues.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from common import DATA, SHARED, machine, table, write_section

import halfplate
from halfplate.calibration import read_text

MODEL, PATTERN = SHARED / "models" / "stories260K", "5:16"
RULES = {
    "uniform": {},
    **{
        f"{rule}, {spread}": {"ratios": rule, "owl_lambda": spread}
        for rule in ("owl", "farms")
        for spread in (0.08, 0.15)
    },
    "essential": {"ratios": "essential"},
}
METHODS = ("magnitude", "wanda", "sparsegpt")


def texts(folder: Path) -> dict[str, str]:
    """The files to calibrate and to judge on, which are written."""
    documents = read_text(str(DATA / "tinystories" / "train_sample.jsonl.gz"))
    found = {}
    for name, part in (("calibrate", documents[:-200]), ("judge", documents[-200:])):
        found[name] = str(folder / f"{name}.jsonl")
        Path(found[name]).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return found


def measured(folder: Path, files: dict[str, str], method: str, rule: dict[str, Any]) -> dict[str, Any]:
    """One row: compress, evaluate, remove."""
    out = folder / "out"
    options: dict[str, Any] = {"calibration": files["calibrate"], "samples": 64, "seq_len": 512, "threads": 1}
    summary = halfplate.compress(
        MODEL, out, method=method, pattern=PATTERN, benchmark=False, check=False, overwrite=True, **options, **rule
    )
    scores = halfplate.evaluate(out, against=MODEL, text=files["judge"], windows=64, seq_len=512, activations="float")
    shutil.rmtree(out)
    return {
        "nbytes": summary["nbytes"],
        "kept": [ratio["format"] for ratio in summary.get("ratios", ())],
        "knee": summary.get("knee"),
        **{key: scores[key] for key in ("kl", "perplexity", "dense_perplexity")},
    }


def rendered(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name in RULES:
        found = [rows[f"{method}: {name}"] for method in METHODS]
        kept = ", ".join(pattern.partition(":")[0] for pattern in found[1]["kept"]) or "5 everywhere"
        lines.append([name, kept, f"{found[1]['nbytes'] / 1e3:.1f}", *(f"{row['kl']:.3f}" for row in found)])
    dense = next(iter(rows.values()))["dense_perplexity"]
    header = ["ratios", "N of 16 by layer (wanda)", "kB", *(f"KL, {method}" for method in METHODS)]
    knee = rows["magnitude: essential"]["knee"]
    curve = ", ".join(f"{loss - knee['dense']:.2f}" for loss in knee["losses"])
    return (
        f"{machine()}. Perplexity of the original: {dense:.2f}.\n\n{table(header, lines)}\n\n"
        f"The knee that `essential` finds is at {knee['sparsity']:.0%}: the loss rises by {curve} nats at 10, 20, ... 90 %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    file, files = folder / "rows.json", texts(folder)
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for method in METHODS:
        for name, rule in RULES.items():
            if (key := f"{method}: {name}") not in rows:
                rows[key] = measured(folder, files, method, rule)
                print(key, rows[key], flush=True)
                file.write_text(json.dumps(rows))
    write_section("ratios", rendered(rows))


if __name__ == "__main__":
    main()
