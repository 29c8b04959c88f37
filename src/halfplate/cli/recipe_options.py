"""The options that `plan` and `compress` share: a recipe file and flags that override it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from halfplate.cli.parser import positive
from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from halfplate.recipe import Recipe

# The recipe gives values their type and checks them, so that a flag and a file are refused in the same words.
FIELDS = (
    ("--method", "NAME", "how each matrix is compressed (default armor; `halfplate methods` lists them)"),
    (
        "--pattern",
        "N:M",
        "kept values in each group of inputs (default 2:4), or dense (gptq, rtn, and armor on a grid)",
    ),
    ("--block-size", "N", "blocks of the wrappers: auto (default), 0 for none, 1 for diagonal"),
    ("--out-block-size", "N", "blocks of the wrappers of the outputs, where they are to be other ones"),
    ("--core-dtype", "TYPE", "element type of the kept values: bf16 (default), fp16, fp32, int8, int4, int3 or int2"),
    ("--group-size", "N", "columns that share a scale where the core is int8 to int2: 128 (default), 64 or 32"),
    ("--wrapper-dtype", "TYPE", "element type of the wrappers: bf16 (default), fp16, fp32 or int8"),
    (
        "--calibration",
        "SRC",
        "self (default: the model's own text), a .txt/.jsonl/.json file (FILE.jsonl:field), also .gz, or a Hub data set",
    ),
    ("--samples", "N", "calibration sequences (default 64)"),
    ("--seq-len", "L", "tokens of each (default 512)"),
    ("--inputs", "WHICH", "what calibration runs through: the compressed blocks so far (compressed, default) or dense"),
    (
        "--cross-damping",
        "X",
        "correct each matrix towards what the dense inputs give, damped by X (default 1); or none",
    ),
    (
        "--token-limit",
        "X",
        "calibration tokens of more than X times the median energy count as that (default 10); or none",
    ),
    (
        "--precision",
        "TYPE",
        "of the products while text runs through the blocks: auto (default; bf16 where that is fast), bf16 or fp32",
    ),
    (
        "--ratios",
        "WHICH",
        "what each decoder block keeps: uniform (default), or owl: N of M by its outliers, the mean kept",
    ),
    ("--owl-lambda", "X", "half the range of what blocks keep with --ratios owl, a share (default 0.08)"),
    ("--tune-block", "STEPS", "steps that tune each block against the dense one's output, its masks fixed (default 0)"),
    ("--budget", "FRACTION", "choose the level of each matrix within this share of the dense bytes"),
    (
        "--time-budget",
        "FRACTION",
        "or within this share of the time that the dense linears take to decode a token here",
    ),
    (
        "--search",
        "HOW",
        "knapsack (default), or evolution: from there on, by the KL of the model at the levels in question",
    ),
    ("--generations", "N", "of the evolution (default 20)"),
    ("--offspring", "N", "of each generation (default 16)"),
    ("--seed", "S", "seed of everything random (default 0)"),
    ("--device", "NAME", "where to compute: cpu (default) or cuda"),
    ("--threads", "T", "threads of torch and of the kernels"),
    ("--max-kl", "X", "exit with 1 when the KL to the dense model on held-out text exceeds X nats a token"),
)
METHOD_OPTIONS = (
    ("--objective", "WHICH", "what armor minimises: gram (default), the true output error, or diag, the paper's"),
    ("--solver", "WHICH", "how armor solves: exact (default) or paper"),
    ("--iterations", "N", "iterations of the method"),
)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them; a flag that is not given is None and leaves the recipe's value."""
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="a recipe (`halfplate recipe show NAME`) or a YAML file; flags override it",
    )
    for flag, metavar, text in FIELDS + METHOD_OPTIONS:
        parser.add_argument(flag, metavar=metavar, help=text)
    parser.add_argument(
        "--option", metavar="KEY=VALUE", action="append", default=[], help="another option of the method; repeatable"
    )
    for flag, text in (
        ("--include", "compress only matrices whose name matches"),
        ("--exclude", "leave out matrices whose name matches"),
    ):
        parser.add_argument(flag, metavar="PATTERN", action="append", help=f"{text}, e.g. '*.q_proj'; repeatable")
    parser.add_argument(
        "--share-wrappers",
        action="store_const",
        const=True,
        help="one input wrapper for all linears of one input (q, k and v; gate and up)",
    )
    parser.add_argument(
        "--choose",
        metavar="FIELDS",
        type=lambda text: [field.replace("-", "_") for field in text.split(",")],
        help="what a budget may choose (default all: block-size,pattern,core-dtype)",
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        default="local",
        help="who does the work: local (default), processes of this machine, or ray, a cluster (docs/cluster.md)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        help="processes of this machine that share the work (default 1; with ray as many as its cores serve)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the Ray cluster that does the work, or auto for the one this machine is in",
    )
    parser.add_argument(
        "--no-benchmark",
        action="store_false",
        dest="benchmark",
        help="leave out the few seconds that time this machine for the estimate",
    )


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The recipe file, or the defaults, with the flags that were given."""
    from halfplate.recipe import Recipe

    names = [*map(_field, FIELDS), "include", "exclude", "choose", "share_wrappers"]
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = {name: getattr(args, name) for name in map(_field, METHOD_OPTIONS) if getattr(args, name) is not None}
    for text in args.option:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise HalfplateError(f"--option {text!r} is not of the form KEY=VALUE; try iterations=20")
        options[key.replace("-", "_")] = value
    if args.recipe is None:
        return Recipe(**changes, method_options=options)
    return Recipe.from_yaml(args.recipe, **changes, method_options=options)


def _field(option: tuple[str, str, str]) -> str:
    return option[0].removeprefix("--").replace("-", "_")
