"""Measure the methods without a core against what their papers beat, at equal true bytes, in one table a model.

    python benchmarks/factors.py stories260K [--only NAME ...]    whole models: output error and KL
    python benchmarks/factors.py smollm2 [--only NAME ...]        four matrices of one layer: output error

Rows are kept in the cache folder, so a second call continues. The tables go into RESULTS.md.
"""

import argparse
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import CACHE, machine, table, write_section
from quality import prepare

import halfplate
from halfplate.calibration import read_text
from halfplate.cli.console import silence_libraries
from halfplate.methods.solving import relative_error
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe
from halfplate.statistics import InputStatistics, Statistic

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
for budget in (0.157, 0.2025):
    ROWS[f"bitstack, budget {budget:g}"] = {"method": "bitstack", "budget": budget}
ROWS["sparsegpt 2:4 int4"] = {"method": "sparsegpt", "core_dtype": "int4"}
LAYER, MATRICES = 5, ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")  # of SmolLM2
WHOLE = ["row", "bytes of the matrices", "relative output error", "KL", "top-1", "seconds"]
MATRIX = ["row", "bytes of the matrices", *MATRICES, "seconds"]


def measured(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """One row of stories260K: compress, evaluate, remove."""
    out = Path("factors.out")
    made = halfplate.compress(
        "stories260K",
        out,
        calibration="tinystories_calibration.jsonl.gz",
        samples=32,
        seq_len=256,
        threads=1,
        overwrite=True,
        benchmark=False,
        check=False,
        statistics=Statistic.GRAM,
        **recipe,
    )
    text = "tinystories_held_out.jsonl.gz"
    scores = halfplate.evaluate(out, against="stories260K", text=text, windows=16, seq_len=256, activations="float")
    shutil.rmtree(out)
    return {
        "name": name,
        "nbytes": made["nbytes"],
        "dense_nbytes": made["dense_nbytes"],
        "error": made["mean_relative_error"],
        "seconds": made["seconds"]["total"],
        **{key: scores[key] for key in ("kl", "top1_agreement")},
    }


def layer() -> dict[str, tuple[torch.Tensor, InputStatistics]]:
    """The matrices of SmolLM2 with the second moments of their inputs on 16 sequences of C4, kept in the cache folder."""
    file = Path("smollm2_layer.pt")
    if not file.exists():
        loaded, tokens = load_dense("SmolLM2-135M.gguf"), []
        for document in read_text("c4_calibration.jsonl.gz"):
            tokens += loaded.tokenizer(document).input_ids
            if len(tokens) >= 16 * 256:
                break
        ids = torch.tensor(tokens[: 16 * 256]).view(16, 256)
        block = loaded.model.model.layers[LAYER]
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in MATRICES}
        for name in MATRICES:
            block.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0]))
        with torch.no_grad():
            for batch in ids.split(4):
                loaded.model(batch)
        kept = {}
        for name, seen in inputs.items():
            x = torch.cat(seen).flatten(0, 1).double()
            kept[name] = (block.get_submodule(name).weight.detach().float(), x.T @ x / len(x))
        torch.save(kept, file)
    found = torch.load(file)
    return {name: (weight, InputStatistics(4096, g.diagonal().float(), g)) for name, (weight, g) in found.items()}


def measured_layer(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One row of SmolLM2: the four matrices, each with the true second moments of its inputs."""
    recipe, errors, nbytes, dense = Recipe(**fields), {}, 0, 0
    start = time.perf_counter()
    for matrix, (weight, statistics) in layer().items():
        spec = recipe.spec(*weight.shape, 0)
        solution = recipe.create_method().compress(weight, statistics, spec)
        errors[matrix] = relative_error(weight, solution.weight.dense(), statistics)[0]
        nbytes, dense = nbytes + spec.nbytes, dense + spec.dense_nbytes
    seconds = time.perf_counter() - start
    return {"name": name, "nbytes": nbytes, "dense_nbytes": dense, "errors": errors, "seconds": seconds}


def rendered(rows: list[dict[str, Any]], model: str) -> str:
    """The rows as Markdown."""
    whole = max(row["dense_nbytes"] for row in rows)
    lines = []
    for row in rows:
        errors = [f"{error:.4f}" for error in row.get("errors", {}).values()]
        scores = errors or [f"{row['error']:.4f}", f"{row['kl']:.3f}", f"{row['top1_agreement']:.1%}"]
        nbytes = _bytes(row["nbytes"] + whole - row["dense_nbytes"], whole)
        lines.append([row["name"], nbytes, *scores, f"{row['seconds']:.0f}"])
    what, header = {
        "stories260K": ("all layers, TinyStories, 16 windows of 256 tokens", WHOLE),
        "smollm2": (f"relative output errors of matrices of layer {LAYER}, 16 sequences of C4", MATRIX),
    }[model]
    return f"`python benchmarks/factors.py {model}`: {what}; {machine()}.\n\n{table(header, lines)}"


def _bytes(nbytes: int, whole: int) -> str:
    """Bytes with those of matrices that a method leaves as they are, and bits a weight."""
    return f"{nbytes:,} ({nbytes / whole:.1%}, {16 * nbytes / whole:.2f} bits)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("stories260K", "smollm2"))
    only = "measure only the rows whose name starts with one of these"
    parser.add_argument("--only", nargs="+", metavar="TEXT", help=only)
    options = parser.parse_args()
    silence_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    prepare(options.model, CACHE / "factors")
    os.chdir(CACHE / "factors")
    file = Path(f"{options.model}.jsonl")
    done = {row["name"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for name, recipe in ROWS.items():
        alone = options.model == "smollm2" and ("budget" in recipe or "ratios" in recipe)  # only of whole models
        if name not in done and not alone and (not options.only or name.startswith(tuple(options.only))):
            done[name] = (measured if options.model == "stories260K" else measured_layer)(name, recipe)
            with file.open("a") as lines:
                lines.write(json.dumps(done[name]) + "\n")
            print(rendered(list(done.values()), options.model).splitlines()[-1], flush=True)
    write_section(f"factors_{options.model}", rendered([done[name] for name in ROWS if name in done], options.model))


if __name__ == "__main__":
    main()
