"""The options that `plan` and `compress` share: a recipe file and flags that override it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from halfplate.arguments import FLAGS
from halfplate.cli.parser import positive
from halfplate.cli.preferences import PREFERENCES, Choice, chosen, fitted
from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from halfplate.recipe import Recipe

# Recipe converts and checks the values, so that flags and files give the same error messages.
FIELDS = (
    ("--method", "NAME", "compression method (default armor); `halfplate methods` lists them"),
    ("--pattern", "N:M", "keep N of every M inputs, dense for an unpruned core, or none for methods without a core"),
    ("--block-size", "N", "size of the wrappers' blocks: auto, 0 for no wrappers, 1 for diagonal ones"),
    ("--out-block-size", "N", "size of the output wrappers' blocks, if it differs from --block-size"),
    (
        "--core-dtype",
        "TYPE",
        "type of the kept values: bf16, fp16, fp32, or one of few bits, e.g. int4, nl4, nl4k (`halfplate methods` lists all)",
    ),
    ("--group-size", "N", "columns that share one scale of an integer core: 128 (default), 64 or 32"),
    ("--embedding-dtype", "TYPE", "type of the embedding: keep, auto (int8), or int8 to int2"),
    ("--head-dtype", "TYPE", "type of the output layer: keep, auto (int8), or int8 to int2"),
    ("--wrapper-dtype", "TYPE", "type of the wrappers: bf16 (default), fp16, fp32 or int8"),
    (
        "--keep",
        "FRACTION",
        "share of the parameters that stay after a transform that makes the model smaller (docs/pruning.md)",
    ),
    (
        "--effort",
        "WORD",
        "work to spend: quick, normal (default) or best; sets samples and iterations that no option sets",
    ),
    ("--samples", "N", "number of calibration sequences (default 64; 32 with --effort quick, 128 with best)"),
    ("--seq-len", "L", "tokens per calibration sequence (default 512)"),
    (
        "--inputs",
        "WHICH",
        "calibration inputs: from the layers compressed so far (compressed, default) or from the original (dense)",
    ),
    ("--cross-damping", "X", "damping of the correction towards the original outputs (default 1); none turns it off"),
    (
        "--token-limit",
        "X",
        "clip each token's squared norm to X times the batch median (default 10); none turns it off",
    ),
    (
        "--expert-tokens",
        "WHICH",
        "the tokens that are routed to an expert count equally (equal, default), or by the square of their routing weight (gated)",
    ),
    ("--precision", "TYPE", "matmul precision during calibration: auto (default; bf16 if that is fast), bf16 or fp32"),
    (
        "--ratios",
        "WHICH",
        "spread one share over the layers or matrices, with the same average: owl by outliers, farms by spectra, essential by one magnitude, "
        "welore ranks of method svd by singular values; uniform (default) does not",
    ),
    (
        "--owl-lambda",
        "X",
        "half the difference between the largest and smallest kept share of --ratios owl and farms (default 0.08)",
    ),
    ("--tune-block", "STEPS", "steps that train each compressed layer towards the output of the original (default 0)"),
    (
        "--budget",
        "FRACTION",
        "target size of the linears, as a fraction of the original size; chooses the format of each matrix",
    ),
    (
        "--time-budget",
        "FRACTION",
        "target decode time, as a fraction of the time of the original model on this machine",
    ),
    (
        "--fit",
        "SIZE",
        "target size of the whole result, e.g. 600MB, embedding and output layer included; chooses the format of each matrix",
    ),
    (
        "--fit-ram",
        "SIZE",
        "target size in memory, e.g. 4GB, with a cache of --context tokens; chooses the format of each matrix",
    ),
    ("--context", "TOKENS", "tokens in the cache of --fit-ram (default 4096)"),
    (
        "--for",
        "TARGET",
        "program that runs the result: halfplate (default), gguf, vllm, gptq or mlx; only formats that it stores exactly are chosen (docs/budget.md)",
    ),
    ("--search", "HOW", "search within a budget: knapsack (default), or evolution, which also measures the model's KL"),
    ("--generations", "N", "generations of --search evolution (default 20)"),
    ("--offspring", "N", "candidates per generation of --search evolution (default 16)"),
    ("--seed", "S", "random seed (default 0)"),
    ("--device", "NAME", "device to compute on: cpu (default) or cuda"),
    ("--threads", "T", "number of CPU threads"),
    ("--max-kl", "X", "exit with status 1 if the KL to the original on held-out text exceeds X nats per token"),
)
METHOD_OPTIONS = (
    ("--objective", "WHICH", "objective of armor: gram (default, the true output error) or diag (the paper's)"),
    ("--solver", "WHICH", "solver of armor: exact (default) or paper"),
    ("--iterations", "N", "number of iterations of the method"),
)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; a flag that is not given is None and keeps the value of the recipe."""
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="a built-in recipe (`halfplate recipe show NAME`) or a YAML file; other options override it (default everyday, unless an option chooses a format)",
    )
    parser.add_argument(
        "--prefer",
        choices=tuple(PREFERENCES),
        help="one word instead of a format: quality (half the bytes, least loss), size (default, about a third), speed (2:4, to be recovered); other options override it",
    )
    for option in FIELDS + METHOD_OPTIONS:
        flag, metavar, text = option
        parser.add_argument(flag, metavar=metavar, dest=_field(option), help=text)
    parser.add_argument(
        "--calibration",
        metavar="SRC",
        action="append",
        help="calibration text: self (default, generated by the model), self:varied, a text file (docs/texts.md), or a Hub data set; "
        "several with their shares, e.g. wiki.txt:0.5 self:0.5",
    )
    parser.add_argument(
        "--recover",
        metavar="MIN",
        type=float,
        help="minutes that train the result towards the original at the end (default 30 with --prefer speed, else 0)",
    )
    parser.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set another option of the method; may be repeated",
    )
    for flag, text in (
        ("--include", "compress only matrices whose name matches"),
        ("--exclude", "do not compress matrices whose name matches"),
    ):
        parser.add_argument(flag, metavar="PATTERN", action="append", help=f"{text}, e.g. '*.q_proj'; may be repeated")
    parser.add_argument(
        "--transforms",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="transforms to apply to the model before compression, in this order (docs/transforms.md)",
    )
    parser.add_argument(
        "--share-wrappers",
        action="store_const",
        const=True,
        help="share one input wrapper between linears that read the same input (q, k and v; gate and up)",
    )
    parser.add_argument(
        "--types",
        metavar="PATTERN=TYPE",
        action="append",
        help="type of the core in matrices whose name matches, e.g. '*.down_proj=nl5', or '*.down_proj=int6k:16' with the columns that share a scale; may be repeated",
    )
    parser.add_argument(
        "--choose",
        metavar="FIELDS",
        type=_fields,
        help="fields that a budget may vary, separated by commas (default block-size,pattern,core-dtype); with their values: core-dtype=nl4+nl5",
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        default="local",
        help="where tasks run: local (default), or ray for a Ray cluster (docs/cluster.md)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        help="number of processes (default 1; with ray, as many as the cores allow)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of a running Ray cluster, or auto for the one that this machine is part of",
    )
    parser.add_argument(
        "--no-benchmark",
        action="store_false",
        dest="benchmark",
        help="skip the time estimate, which takes a few seconds to measure this machine",
    )


def _fields(text: str) -> list[str]:
    """The fields in a value of --choose, as a recipe names them."""
    parts = (entry.partition("=") for entry in text.split(","))
    return [field.replace("-", "_") + equals + values for field, equals, values in parts]


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe, --prefer or the defaults, overridden by the given flags."""
    return chosen(args, _changes(args))[1]


def choice_from(args: argparse.Namespace) -> tuple[Choice, Recipe]:
    """What chose the format for the model of `args`, and the recipe."""
    changes = _changes(args)
    return fitted(args, *chosen(args, changes), changes)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Recipe that are given as flags."""
    names = [
        *map(_field, FIELDS),
        "calibration",
        "include",
        "exclude",
        "choose",
        "share_wrappers",
        "transforms",
        "types",
    ]
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = {name: getattr(args, name) for name in map(_field, METHOD_OPTIONS) if getattr(args, name) is not None}
    for text in args.option:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise HalfplateError(f"--option {text!r} is not of the form KEY=VALUE; try iterations=20")
        options[key.replace("-", "_")] = value
    return changes | {"method_options": options}


def _field(option: tuple[str, str, str]) -> str:
    """The name of the field of an option."""
    named = {flag: field for field, flag in FLAGS.items()}
    return named.get(option[0], option[0].removeprefix("--").replace("-", "_"))
