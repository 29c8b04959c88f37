"""Measure structured pruning: KL and perplexity of the models that every method makes, in one table.

    python benchmarks/structured.py MODEL -o RESULTS --calibration TEXT --text TEXT [--keep 0.9 0.75] [--methods flap ...]

RESULTS is a folder with one line of JSON for each finished row, so a second call continues. The calibration and the evaluation text are files
as `halfplate eval --text` reads them. The smaller models are removed after they are measured; the table goes into RESULTS.md.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from common import machine, table, write_section

import halfplate

METHODS = ("magnitude-structured", "wanda-structured", "flap", "cfsp", "tyr", "nirvana", "depth", "slicegpt", "modegpt")
HEADER = ["transform", "keep", "parameters", "share", "KL", "top-1", "perplexity", "seconds"]


def measured(model: str, name: str, keep: float, options: argparse.Namespace) -> dict[str, Any]:
    """One row: prune, evaluate, remove."""
    out = options.out / f"{name}-{keep:g}"
    made = halfplate.prune(
        model,
        out,
        keep,
        transforms=[name],
        calibration=options.calibration,
        samples=options.samples,
        seq_len=512,
        threads=1,
        overwrite=True,
        check=False,
    )
    scores = halfplate.evaluate(out, against=model, text=options.text, windows=options.windows, seq_len=512)
    shutil.rmtree(out)
    return {
        "keep": keep,
        "transform": name,
        "parameters": made["parameters"],
        "share": made["parameters"] / made["dense_parameters"],
        "told": made["pruned"]["told"],
        "seconds": made["seconds"]["total"],
        **{key: scores[key] for key in ("kl", "top1_agreement", "perplexity", "dense_perplexity")},
    }


def rendered(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the best of each size last."""
    lines = [
        [
            f"`{row['transform']}`",
            f"{row['keep']:g}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['share']:.1%}",
            f"{row['kl']:.3f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['perplexity']:,.1f}",
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(rows, key=lambda row: (-row["keep"], -row["kl"]))
    ]
    dense = rows[0]["dense_perplexity"]
    return f"{machine()}. Perplexity of the original: {dense:.1f}.\n\n{table(HEADER, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.75])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["transform"], row["keep"]) for row in rows}
    for keep in options.keep:
        for name in options.methods:
            if (name, keep) not in done:
                rows.append(measured(options.model, name, keep, options))
                with file.open("a") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
    write_section("structured", rendered(rows))


if __name__ == "__main__":
    main()
