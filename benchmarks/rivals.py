"""All systems side by side: structured pruning, factors, N:M, grids and llama.cpp's types at four sizes, in one sweep for each model.

    python benchmarks/rivals.py stories260K [--only TEXT ...]    about an hour on one core
    python benchmarks/rivals.py off_grid [--only TEXT ...]       a night; what a reader compares most comes first

Sizes are shares of the bytes of the decoder's linears at 2 bytes per weight; everything else counts whole and stays as it is, so structured
pruning has to take as many bytes away from the whole model. Each system gets the largest form that fits. Rows are kept in
benchmarks/cache/rivals/MODEL, and a second call continues. Tables and pictures go into RESULTS.md and docs/pictures.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import CACHE, machine, tell_rows, write_section
from quality import MODELS, prepare
from rivals_files import llama_rows
from rivals_tables import pictures, rendered

import halfplate
from halfplate.cli.console import silence_libraries
from halfplate.models.sources import open_source
from halfplate.recipe import Recipe
from halfplate.transforms.structure.graph import StructureGraph

SHARES = (0.75, 0.6, 0.5, 0.25)
STRUCTURED = ("tyr", "modegpt", "flap", "wanda-structured", "cfsp", "nirvana", "depth", "slicegpt")
STRUCTURED += ("magnitude-structured",)
GRAM, PLAIN = {"weighting": "gram"}, {"weighting": "none"}
FACTORS: dict[str, dict[str, Any]] = {
    "svd by Gram matrix": {"method": "svd", "method_options": GRAM},
    "rocket": {"method": "rocket"},
    "bitstack": {"method": "bitstack"},
    "gqsa": {"method": "gqsa"},
    "welore (svd by Gram matrix)": {"method": "svd", "method_options": GRAM, "ratios": "welore"},
    "svd plain": {"method": "svd", "method_options": PLAIN},
    "svd by second moments (FWSVD)": {"method": "svd", "method_options": {"weighting": "diagonal"}},
    "monarch": {"method": "monarch"},
    "cospadi": {"method": "cospadi"},
}
PRUNERS = ("sparsegpt", "wanda", "ria", "nowag", "magnitude")
WRAPPED = ("armor", "denoiserotator", "slim")
GRIDS = ("gptq", "rtn", "armor")
# What the 2:4 cores of a size are made of; if wrappers do not fit, what follows.
CORES: tuple[tuple[float, dict[str, Any]], ...] = (
    (0.75, {"core_dtype": "bf16"}),
    (0.6, {"core_dtype": "bf16"}),
    (0.5, {"core_dtype": "int8", "group_size": 32}),
    (0.25, {"core_dtype": "int4", "group_size": 32}),
    (0, {"core_dtype": "int3", "group_size": 32}),
    (0, {"core_dtype": "int3", "group_size": 32, "wrapper_dtype": "int8"}),
)
BLOCKS = (4, 8, 16, 32, 64, 128)
TYPES = ("int8", "int6", "int5", "int4", "int3", "int2")
GROUPS = (32, 64, 128)  # those of kernels
# What a reader compares most is measured first, and what takes hours on SmolLM2 last.
FIRST = (
    "armor, unpruned",
    "armor, 2:4",
    "tyr",
    "sparsegpt, 2:4",
    "gptq, unpruned",
    "armor everyday, embedding int8",
    "bitstack",
)
FIRST += ("wanda, 2:4", "depth", "rocket", "svd by Gram matrix", "gqsa", "modegpt", "flap", "rtn, unpruned")
LAST = ("cospadi",)
# Rotations of the model before a rival, at the size of the last share.
ROTATED = ("rtn", "gptq", "armor", "sparsegpt")
SETTINGS: dict[str, dict[str, Any]] = {
    "stories260K": {
        "eval": {"text": ["tinystories_held_out.jsonl.gz"], "seq_len": 256, "windows": 16},
        "base": {"calibration": "tinystories_calibration.jsonl.gz", "samples": 32, "seq_len": 256},
        "speed": {"prompt": 16, "new_tokens": 16, "rounds": 3, "threads": 1},
    },
    "off_grid": {
        "eval": {"text": ["wikitext2_valid.jsonl.gz"], "seq_len": 512, "windows": 8},
        "base": {"calibration": "mixed_calibration.jsonl.gz", "samples": 16, "seq_len": 512},
        "speed": {"prompt": 32, "new_tokens": 16, "rounds": 3, "threads": 1},
    },
}


class Sizes:
    """The bytes of a model, and the largest form of a recipe that fits a share of them."""

    def __init__(self, model: str) -> None:
        plain = halfplate.plan(model, method="rtn", core_dtype="int8")
        self._shapes = Counter((spec.d_out, spec.d_in) for spec in plain.specs.values())
        self._parameters = StructureGraph.of(open_source(model)).parameters()
        self.linears, self.others = plain.dense_nbytes, plain.other_nbytes

    def limit(self, share: float) -> float:
        """The most bytes of all weights at a share."""
        return share * self.linears + self.others

    def keep(self, share: float) -> float:
        """The share of all parameters that stays if only linears shrink."""
        return 1 - (1 - share) * self.linears / 2 / self._parameters

    def largest(self, share: float, forms: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The form with the most bytes within the share, the first of equals; None if none fits."""
        sized = [(nbytes, form) for form in forms if (nbytes := self._nbytes(form)) <= share * self.linears]
        return max(sized, key=lambda one: one[0])[1] if sized else None

    def _nbytes(self, form: dict[str, Any]) -> float:
        """The bytes of the linears; infinite if a shape cannot have the form."""
        recipe, total = Recipe(**form), 0
        block = recipe.block_size if isinstance(recipe.block_size, int) else 0
        width = block if recipe.create_method().wrapped else 0
        for (d_out, d_in), count in self._shapes.items():
            if d_in % recipe.parsed_pattern.m or (width and (d_out % width or d_in % width)):
                return float("inf")
            total += count * recipe.spec(d_out, d_in, block).nbytes
        return float(total)


def rows_of(sizes: Sizes, share: float) -> dict[str, dict[str, Any] | None]:
    """The recipe of every system at one size by its name, most important first; None if no form fits."""
    patterns = [{"pattern": f"{kept}:16"} for kept in range(2, 16)]
    cores = CORES[next(at for at, (size, _) in enumerate(CORES) if size == share) :]
    grids = [{"core_dtype": name, "group_size": group, "pattern": "dense"} for name in TYPES for group in GROUPS]
    found: dict[str, dict[str, Any] | None] = {}
    for method in GRIDS:
        own = [form | {"method": method} | ({"block_size": 0} if method == "armor" else {}) for form in grids]
        found[f"{method}, unpruned"] = sizes.largest(share, own)
    for method in WRAPPED:
        forms = ([_paired(method, core) | {"block_size": block} for block in BLOCKS] for _, core in cores)
        found[f"{method}, 2:4"] = next(filter(None, (sizes.largest(share, own) for own in forms)), None)
    for method in PRUNERS:
        found[f"{method}, 2:4"] = sizes.largest(share, [_paired(method, cores[0][1])])
    for name in STRUCTURED:
        found[name] = {"prune": name, "keep": sizes.keep(share)}
    for name, fields in FACTORS.items():
        found[name] = fields | {"method_options": fields.get("method_options", {}) | {"share": share}}
    for method in PRUNERS:
        found[f"{method}, of 16"] = sizes.largest(share, [{"method": method} | form for form in patterns])
    return found


def _paired(method: str, core: dict[str, Any]) -> dict[str, Any]:
    kept = core if method != "slim" else {name: core[name] for name in core if name != "wrapper_dtype"}
    return {"method": method, "pattern": "2:4"} | kept


def whole_files() -> dict[str, dict[str, Any]]:
    """Our own files with an embedding on a grid, which llama.cpp's files have, too."""
    shared = {"pattern": "dense", "block_size": 0, "group_size": 32, "embedding_dtype": "int8"}
    fives = ["*.v_proj=nl5", "*.up_proj=nl5", "*.down_proj=nl5"]
    return {
        "armor everyday, embedding int8": shared | {"core_dtype": "nl4", "types": fives},
        "armor int8, embedding int8": shared | {"core_dtype": "int8"},
        "armor nl4, embedding int8": shared | {"core_dtype": "nl4"},
    }


def sweep_of(model: str, name: str) -> tuple[dict[str, Any], dict[str, dict[float, str]]]:
    """The sweep of a model, and the name of the row of each system at each size. The same form at two sizes is one row."""
    sizes = Sizes(name)
    rows: dict[str, dict[str, Any]] = {}
    places: dict[str, dict[float, str]] = {}
    for share in reversed(SHARES):
        for system, fields in rows_of(sizes, share).items():
            if fields is not None:
                row = next((made for made, other in rows.items() if other == fields), f"{system}, {share:g}")
                rows[row] = fields
                places.setdefault(system, {})[share] = row
        if share == SHARES[-1]:
            for system, fields in whole_files().items():
                rows[system] = fields
                places[system] = {share: system}
    for method in ROTATED:
        system = f"{method}, {'2:4' if method == 'sparsegpt' else 'unpruned'}"
        rows[f"{system}, rotated"] = rows[places[system][SHARES[-1]]] | {"transforms": ["rotate"]}
    systems = sorted(
        places, key=lambda system: (system in LAST, FIRST.index(system) if system in FIRST else len(FIRST))
    )
    order = [row for system in systems for row in places[system].values()]
    order += [row for row in rows if row not in order]
    listed = ["original", *({"name": row, **rows[row]} for row in dict.fromkeys(order))]
    return {"model": name, **SETTINGS[model], "rows": listed}, places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SETTINGS)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="measure only rows whose name holds one of these")
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the tables of what is there")
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    texts, out = CACHE / "quality", (CACHE / "rivals" / options.model).resolve()
    prepare(options.model, texts)
    os.chdir(texts)  # the sweep names what is there
    name = str(MODELS[options.model][0])
    sweep, places = sweep_of(options.model, name)
    names = [row if isinstance(row, str) else row["name"] for row in sweep["rows"]]
    only = [row for row in names if not options.only or any(part in row for part in options.only)]
    result = halfplate.sweep(sweep, out, [] if options.tables else only, report=tell_rows)
    files = llama_rows(Path(name), out / "llama", sweep, measure=not options.tables and not options.only)
    sizes = Sizes(name)
    limits = {share: sizes.limit(share) for share in SHARES}
    drawn = pictures(options.model, result, files)
    write_section(f"rivals_{options.model}", f"{machine()}.\n\n{rendered(result, places, files, limits)}\n\n{drawn}")


if __name__ == "__main__":
    main()
