"""Show what compress would do: every matrix, the bytes before and after, what is skipped and why."""

import argparse
from typing import TYPE_CHECKING

from halfplate.cli.parser import add_output_arguments
from halfplate.cli.recipe_options import add_recipe_arguments, recipe_from

if TYPE_CHECKING:
    from halfplate.planning import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local Hugging Face folder, a Hub id or a .gguf file")
    add_recipe_arguments(parser)
    add_output_arguments(parser, progress=False)


def run(args: argparse.Namespace) -> int:
    recipe = recipe_from(args)
    from halfplate.cli.console import print_json, silence_libraries
    from halfplate.planning import make_plan

    silence_libraries()
    plan = make_plan(args.model, recipe)
    if args.json:
        print_json(plan.to_json())
    else:
        _print(plan)
    return 0


def _print(plan: "Plan") -> None:
    from halfplate.cli.console import megabytes, print_pairs, print_table
    from halfplate.cli.wishes import served

    entries = [matrix.to_json() for matrix in plan.matrices]
    print_table(
        f"{plan.model}: {len(plan.specs)} matrices to compress by {plan.recipe.method}",
        ("name", "format", "core", "shape", "dense bytes", "bytes", "why skipped"),
        [
            (
                entry["name"],
                entry["format"],
                "-" if entry["skipped"] else f"{entry['pattern']} {entry['core_dtype']}",
                "×".join(map(str, entry["shape"])) if entry["shape"] else "-",
                entry["dense_nbytes"],
                entry["nbytes"],
                entry["reason"] or "",
            )
            for entry in entries
        ],
    )
    wrappers = (
        f"blocks of {plan.block_size}, {plan.wrapper_share:.1%} of the dense parameters" if plan.block_size else "none"
    )
    print_pairs(
        "in all",
        [
            ("linears, dense at 2 bytes a weight", megabytes(plan.dense_nbytes)),
            ("linears, compressed", f"{megabytes(plan.nbytes)} ({plan.nbytes / plan.dense_nbytes:.1%})"),
            ("wrappers", wrappers),
            *(
                [("N of M by block", "chosen in the run, this pattern on average")]
                if plan.recipe.ratios != "uniform"
                else []
            ),
            ("serves", served(plan.recipe)),
            ("everything else", megabytes(plan.other_nbytes)),
            ("source weight files", megabytes(plan.source_nbytes)),
            ("time, a rough estimate for 2 cores", f"{plan.seconds_estimate:.0f} s"),
            ("peak memory, a rough estimate", megabytes(plan.peak_memory_estimate)),
            ("fingerprint", plan.fingerprint[:16]),
        ],
    )
