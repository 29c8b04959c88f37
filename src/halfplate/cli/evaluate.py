"""Measure perplexity and, against the original model, KL divergence and top-1 agreement."""

import argparse
from typing import Any

from halfplate.cli.parser import add_activations_argument, add_fit_argument, add_output_arguments, positive
from halfplate.errors import HalfplateError

MEANS = ("kl", "top1_agreement")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Halfplate checkpoint, a Hugging Face folder, a Hub id or a .gguf file"
    )
    text = "text files or Hub data sets to score (default: held-out text that the original model generates)"
    parser.add_argument("--text", metavar="FILE", nargs="+", action="extend", help=text)
    parser.add_argument("--against", metavar="ORIGINAL", help="original model to compare with")
    parser.add_argument(
        "--seq-len",
        type=positive,
        metavar="L",
        help="tokens per window (default 1024, or 256 for generated text)",
    )
    parser.add_argument(
        "--windows",
        type=positive,
        metavar="N",
        help="score only the first N windows (default all, or 16 of generated text)",
    )
    parser.add_argument("--threads", type=positive, metavar="T", help="number of CPU threads")
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="lm-eval tasks to score (needs halfplate[tasks]); without --text, no text is scored",
    )
    parser.add_argument("--tasks-folder", metavar="DIR", help="folder with more lm-eval task definitions")
    parser.add_argument("--limit", type=positive, metavar="N", help="score only the first N rows of each task")
    add_fit_argument(parser)
    add_activations_argument(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.seq_len is not None and args.seq_len < 2:
        raise HalfplateError(f"--seq-len {args.seq_len} leaves no token to score; expected at least 2")
    from halfplate import evaluate
    from halfplate.cli.console import print_json, progress, silence_libraries
    from halfplate.cli.verdicts import print_verdict, verdict_on

    silence_libraries()
    options = ("against", "seq_len", "windows", "tasks_folder", "limit", "threads", "activations", "fit")
    tasks = None if args.tasks is None else [name for name in args.tasks.split(",") if name]
    with progress(args) as report:
        result = evaluate(
            args.model, args.text, tasks, **{name: getattr(args, name) for name in options}, report=report
        )
    verdict = verdict_on(result, args.against, args.model) if args.against else None
    if args.json:
        print_json(result if verdict is None else result | {"verdict": verdict})
        return 0
    _print(args, result)
    if verdict is not None:
        print_verdict(verdict, f"{result['tokens']:,} tokens")
    return 0


def _print(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from halfplate.cli.console import print_table

    if "tasks" in result:
        measures = list(dict.fromkeys(key for found in result["tasks"].values() for key in found))
        print_table(
            f"{args.model}, by lm-eval",
            ("task", *(key.replace("_", " ") for key in measures)),
            [(name, *(found.get(key) for key in measures)) for name, found in result["tasks"].items()],
        )
    if "tokens" not in result:
        return
    keys = [key for key in ("perplexity", "dense_perplexity", *MEANS, "tokens", "windows", "seq_len") if key in result]
    rows = [(name, *(measures[key] for key in keys)) for name, measures in result.get("texts", {}).items()]
    rows.append(
        (
            "all" if rows else "held-out, self-generated" if args.text is None else args.text[0],
            *(result[key] for key in keys),
        )
    )
    print_table(
        args.model + (f" against {args.against}" if args.against else ""),
        ("text", *(key.replace("_", " ") for key in keys)),
        rows,
    )
    if "protocol" in result:
        print("text: " + ", ".join(f"{key} {value}" for key, value in result["protocol"].items()))
