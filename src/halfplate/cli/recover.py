"""Train a compressed model towards the dense one, its masks kept."""

import argparse
import sys
from typing import Any

from halfplate.cli.parser import add_output_arguments, positive
from halfplate.limits import use_threads

# Those of `Recovery`, which checks them; one that is not given is left to its default there.
NUMBERS: tuple[tuple[str, Any, str, str], ...] = (
    ("--tokens", int, "N", "tokens to train on"),
    ("--minutes", float, "T", "or minutes to train for"),
    ("--samples", int, "N", "sequences to sample where the text is `self` (default 256)"),
    ("--seq-len", int, "L", "tokens of a sequence (default 512)"),
    ("--batch", int, "N", "sequences of a step, over all processes (default 2)"),
    ("--learning-rate", float, "X", "of AdamW at its highest, relative to each tensor (default 3e-4)"),
    ("--square-head", float, "X", "weight of the feature loss SquareHead (default 0: none)"),
    ("--seed", int, "S", "seed of the text and of its order (default 1)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Halfplate checkpoint")
    parser.add_argument("--teacher", metavar="DENSE", required=True, help="the dense model that it was compressed from")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="folder to write the trained checkpoint to")
    parser.add_argument("--train", metavar="WHAT", help="all (default: wrappers and kept values) or wrappers")
    parser.add_argument("--no-norms", dest="norms", action="store_false", default=None, help="leave norms and biases")
    text = "text to train on (.txt or .jsonl, also .gz; or a Hub data set); default self, sampled from the teacher"
    parser.add_argument("--text", metavar="FILE", help=text)
    for flag, kind, metavar, what in NUMBERS:
        parser.add_argument(flag, type=kind, metavar=metavar, help=what)
    parser.add_argument("--precision", metavar="TYPE", help="of the products: auto (default), bf16 or fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default cpu)")
    parser.add_argument("--threads", type=positive, metavar="T", help="threads of torch")
    parser.add_argument(
        "--save-every", type=float, metavar="MIN", default=5.0, help="minutes between two saves (default 5)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from where an interrupted run was saved")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds a model already")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:

    from halfplate.cli.console import print_json, progress, silence_libraries
    from halfplate.execution.recover import recover
    from halfplate.recovery.settings import Recovery

    silence_libraries()
    names = [flag.removeprefix("--").replace("-", "_") for flag, *_ in NUMBERS]
    given = {name: getattr(args, name) for name in (*names, "train", "norms", "text", "precision")}
    settings = Recovery(**{name: value for name, value in given.items() if value is not None})
    use_threads(args.threads)
    try:
        with progress(args) as report:
            summary = recover(
                args.model,
                args.teacher,
                args.out,
                settings,
                overwrite=args.overwrite,
                resume=args.resume,
                report=report,
                save_minutes=args.save_every,
                device=args.device,
            )
    except KeyboardInterrupt:
        print(
            f"halfplate: interrupted; the same command with --resume goes on from the last save, at most {args.save_every:g} minutes old",
            file=sys.stderr,
        )
        return 1
    if summary is None:  # another process of `accelerate launch` speaks
        return 0
    if args.json:
        print_json(summary)
    else:
        _print(summary)
    return 0


def _print(summary: dict[str, Any]) -> None:
    from halfplate.cli.console import print_pairs

    rows: list[tuple[str, Any]] = [
        ("steps", summary["steps"]),
        ("tokens trained on", summary["tokens"]),
        ("parameters trained", summary["trained_parameters"]),
    ]
    if "after" in summary:
        before, after = summary["before"], summary["after"]
        rows += [
            ("KL on held-out text, before", before["kl"]),
            ("KL on held-out text, after", after["kl"]),
            ("perplexity there, before", before["perplexity"]),
            ("perplexity there, after", after["perplexity"]),
            ("perplexity there, dense", before["dense_perplexity"]),
            ("seconds", summary["seconds"]["total"]),
        ]
    print_pairs(f"{summary['out']}: recovered from {summary['teacher']}", rows)
