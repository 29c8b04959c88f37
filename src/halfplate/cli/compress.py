"""Compress a model and write a checkpoint."""

import argparse
import sys
from shlex import quote
from typing import Any

from halfplate.cli.parser import add_output_arguments
from halfplate.cli.recipe_options import add_recipe_arguments, choice_from
from halfplate.cli.recovering import before_recovery, check_limit, minutes_of, recovered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local Hugging Face folder, a Hub id or a .gguf file")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it already holds a model")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same command")
    parser.add_argument(
        "--no-check",
        action="store_false",
        dest="check",
        help="skip the self-check, which compares the written checkpoint with the solved weights and with MODEL",
    )
    add_recipe_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    choice, recipe = choice_from(args)
    from halfplate import compress
    from halfplate.cli.console import print_json, progress, silence_libraries
    from halfplate.cli.verdicts import verdict_on
    from halfplate.cli.wishes import served

    silence_libraries()
    if choice.fallback is not None:
        print(f"halfplate: {choice.what}: {choice.fallback}", file=sys.stderr)
    minutes = minutes_of(args, choice)
    with progress(args) as report:
        summary = compress(
            args.model,
            args.out,
            before_recovery(recipe) if minutes else recipe,
            overwrite=args.overwrite,
            report=report,
            resume=args.resume,
            engine=args.engine,
            workers=args.workers,
            address=args.address,
            benchmark=args.benchmark,
            check=args.check,
        )
        if minutes:
            summary["recovery"] = recovered(args, recipe, minutes, report)
    recovery = summary.get("recovery", {})
    judged = recovery.get("after") or summary.get("held_out") or summary["check"] or {}
    verdict = verdict_on(judged, args.model, args.out, recipe)
    if args.json:
        print_json(summary | {"verdict": verdict})
    else:
        _print(summary, served(recipe))
        _print_verdict(summary, verdict)
    if minutes:
        check_limit(recipe, args.out, judged)
    return 0


def _print(summary: dict[str, Any], wish: str) -> None:
    from halfplate.calibration.routed import in_words
    from halfplate.cli.console import megabytes, print_pairs, whole_checkpoint
    from halfplate.cli.wishes import kernels

    seconds = ", ".join(f"{phase} {spent:.1f}" for phase, spent in summary["seconds"].items() if phase != "total")
    rows: list[tuple[str, Any]] = [
        ("matrices compressed", len(summary["matrices"])),
        ("matrices, original at 2 bytes per weight", megabytes(summary["dense_nbytes"])),
        ("matrices, compressed", f"{megabytes(summary['nbytes'])} ({summary['nbytes'] / summary['dense_nbytes']:.1%})"),
        ("optimised for", wish),
        ("kernels", kernels(summary["recipe"]["target"], summary["without_kernel"])),
        ("everything else", megabytes(summary["other_nbytes"])),
        ("whole checkpoint", whole_checkpoint(summary["nbytes"], summary["dense_nbytes"], summary["other_nbytes"])),
        ("source weight files", megabytes(summary["source_nbytes"])),
        (
            f"mean relative error ({summary['error_kind']}{', before tuning' * bool(summary['tuned_blocks'])})",
            summary["mean_relative_error"],
        ),
        ("peak memory", megabytes(summary["peak_rss_bytes"])),
        ("seconds", f"{summary['seconds']['total']:.1f} ({seconds})"),
    ]
    if summary["tokens_per_expert"]:
        rows.append(("calibration tokens of an expert", in_words(summary["tokens_per_expert"])))
    if fit := summary["fit"]:
        rows.append(("size", f"{megabytes(fit['spent_bytes'])} of {megabytes(fit['nbytes'])}, {fit['spoken']}"))
    if summary["levels"]:
        rows.append(("formats chosen", "; ".join(f"{count} x {level}" for level, count in summary["levels"].items())))
    if "ratios" in summary:
        rows.append(("kept by layer", ", ".join(f"{ratio['block']}: {ratio['format']}" for ratio in summary["ratios"])))
    if knee := summary.get("knee"):
        rows.append(
            (
                "essential sparsity",
                f"{knee['sparsity']:.0%}; if more of the smallest weights go, the perplexity rises by more than 5 %",
            )
        )
    if tuned := summary["tuned_blocks"].values():
        won = sum(block["after"] < block["before"] for block in tuned)
        before, after = (sum(block[end] for block in tuned) / len(tuned) for end in ("before", "after"))
        rows.append(
            (
                "tuning, mean error of a layer on held-out text",
                f"{before:.4f} to {after:.4f}, {won} of {len(tuned)} improved",
            )
        )
    if summary["search"]:
        first, last = (summary["search"]["trajectory"][end]["kl"] for end in (0, -1))
        rows.append(("KL before and after the search", f"{first:.4f}, {last:.4f}"))
    rows += [("note", note) for note in summary["notes"]]
    if summary["skipped"]:
        rows.append(("matrices not compressed", f"{len(summary['skipped'])}, e.g. {summary['skipped'][0]['reason']}"))
    print_pairs(f"{summary['out']}: {summary['model']} by {summary['method']}", rows)
    print(f"report: {summary['report'] or 'could not be written: ' + summary['report_error']}")


def _print_verdict(summary: dict[str, Any], verdict: dict[str, Any] | None) -> None:
    from halfplate.cli.verdicts import print_verdict

    recovery = summary.get("recovery", {})
    if "left_out" in recovery:
        print(f"recovery: without success; OUT is as compressed: {recovery['left_out']}")
    if "after" in recovery:
        print(
            f"recovery: KL {recovery['before']['kl']:.4g} before, {recovery['after']['kl']:.4g} after, on held-out text"
        )
    if verdict is None:
        # With --no-check.
        print(f"quality: not measured; halfplate eval {quote(summary['out'])} --against {quote(summary['model'])}")
        return
    text = f"{summary['check']['tokens']} tokens of built-in text" if summary["check"] else ""
    print_verdict(verdict, "held-out text" if "held_out" in summary or "after" in recovery else text)
