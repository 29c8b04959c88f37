"""Measure the methods without a core against what their papers beat, at equal true bytes, in one table a model.

    python benchmarks/factors.py MODEL [--only NAME ...]

MODEL is stories260K (all layers) or smollm2 (two layers). Rows are kept in the cache folder, so a second call continues. The table goes into RESULTS.md.
"""

import argparse
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from common import CACHE, machine, table, write_section
from quality import MODELS, prepare

import halfplate
from halfplate.cli.console import silence_libraries
from halfplate.statistics import Statistic

PLAIN, DIAGONAL, GRAM = ({"weighting": name} for name in ("none", "diagonal", "gram"))


def svd(share: float, **more: Any) -> dict[str, Any]:
    """Low rank at a share of the bytes."""
    return {"method": "svd", "method_options": {"share": share} | more.pop("options", {})} | more


ROWS: dict[str, dict[str, Any]] = {}
for share in (0.9, 0.75, 0.5):
    ROWS |= {
        f"svd {share:g}, plain": svd(share, options=PLAIN),
        f"svd {share:g}, by second moments (FWSVD)": svd(share, options=DIAGONAL),
        f"svd {share:g}, by Gram matrix": svd(share, options=GRAM),
        f"svd {share:g}, plain, welore": svd(share, options=PLAIN, ratios="welore"),
        f"svd {share:g}, by Gram matrix, welore": svd(share, options=GRAM, ratios="welore"),
        f"rocket {share:g}": {"method": "rocket", "method_options": {"share": share}},
        f"cospadi {share:g}": {"method": "cospadi", "method_options": {"share": share}},
        f"monarch {share:g}, plain": {"method": "monarch", "method_options": {"share": share} | PLAIN},
        f"monarch {share:g}, by Gram matrix": {"method": "monarch", "method_options": {"share": share} | GRAM},
    }
for name in ("svd", "rocket"):
    ROWS[f"{name}, budget 0.75"] = {"method": name, "budget": 0.75}
for bits in (2, 3):
    for method in ("rtn", "gptq"):
        for group in (128, 32):
            options = {"method": method, "core_dtype": f"int{bits}", "group_size": group}
            ROWS[f"{method} int{bits}, groups of {group}"] = options
for share in (0.16, 0.2, 0.25):
    for how in ("diagonal", "gram"):
        options = {"share": share, "weighting": how}
        ROWS[f"bitstack {share:g}, {how}"] = {"method": "bitstack", "method_options": options}
ROWS["gqsa, half of the groups"] = {"method": "gqsa", "method_options": {"kept": 0.5}}
ROWS["sparsegpt 2:4 int4"] = {"method": "sparsegpt", "core_dtype": "int4"}
# Of each model: the patterns of what is compressed, and the text for the statistics and the evaluation.
LAYERS = {"stories260K": [], "smollm2": ["*layers.5.*", "*layers.20.*"]}
TEXT = {"stories260K": "tinystories", "smollm2": "c4"}
HEADER = ["row", "bytes of the matrices", "relative output error", "KL", "top-1", "seconds"]


def measured(model: str, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """One row: compress, evaluate, remove."""
    place, text, out = MODELS[model][0], TEXT[model], Path("factors.out")
    made = halfplate.compress(
        place,
        out,
        calibration=f"{text}_calibration.jsonl.gz",
        samples=32,
        seq_len=256,
        threads=1,
        include=LAYERS[model],
        overwrite=True,
        benchmark=False,
        check=False,
        statistics=Statistic.GRAM,
        **recipe,
    )
    scores = halfplate.evaluate(out, against=place, text=f"{text}_held_out.jsonl.gz", windows=16, seq_len=256)
    shutil.rmtree(out)
    return {
        "name": name,
        "nbytes": made["nbytes"],
        "dense_nbytes": made["dense_nbytes"],
        "error": made["mean_relative_error"],
        "seconds": made["seconds"]["total"],
        **{key: scores[key] for key in ("kl", "top1_agreement")},
    }


def rendered(rows: list[dict[str, Any]], model: str) -> str:
    """The rows as Markdown."""
    whole = max(row["dense_nbytes"] for row in rows)
    lines = [
        [
            row["name"],
            _bytes(row["nbytes"] + whole - row["dense_nbytes"], whole),
            f"{row['error']:.4f}",
            f"{row['kl']:.3f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    where = " and ".join(pattern.strip("*.") for pattern in LAYERS[model]) or "all layers"
    return f"`python benchmarks/factors.py {model}`; {where}; {TEXT[model]}, 16 windows of 256 tokens; {machine()}.\n\n{table(HEADER, lines)}"


def _bytes(nbytes: int, whole: int) -> str:
    """Bytes with those of matrices that a method leaves as they are, and bits a weight."""
    return f"{nbytes:,} ({nbytes / whole:.1%}, {16 * nbytes / whole:.2f} bits)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=LAYERS)
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="measure only the rows whose name starts with one of these"
    )
    options = parser.parse_args()
    silence_libraries()
    warnings.simplefilter("ignore")
    prepare(options.model, CACHE / "factors")
    os.chdir(CACHE / "factors")
    file = Path(f"{options.model}.jsonl")
    done = {row["name"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for name, recipe in ROWS.items():
        if name not in done and (not options.only or name.startswith(tuple(options.only))):
            done[name] = measured(options.model, name, recipe)
            with file.open("a") as lines:
                lines.write(json.dumps(done[name]) + "\n")
            print(rendered(list(done.values()), options.model).splitlines()[-1], flush=True)
    write_section(f"factors_{options.model}", rendered([done[name] for name in ROWS if name in done], options.model))


if __name__ == "__main__":
    main()
