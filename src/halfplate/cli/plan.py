"""Show what compress would do: every matrix, its size before and after, and skipped matrices with the reason."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfplate.cli.parser import add_output_arguments
from halfplate.cli.preferences import rows_of
from halfplate.cli.recipe_options import add_recipe_arguments, choice_from
from halfplate.cli.recovering import minutes_of

if TYPE_CHECKING:
    from halfplate.planning import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local Hugging Face folder, a Hub id or a .gguf file")
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, help="folder of the result, to check its disk space")
    add_recipe_arguments(parser)
    add_output_arguments(parser, progress=False)


def run(args: argparse.Namespace) -> int:
    choice, recipe = choice_from(args)
    minutes = minutes_of(args, choice)
    import halfplate
    from halfplate.checkpoint.output import check_place
    from halfplate.cli.console import print_json, silence_libraries
    from halfplate.planning.room import refusal

    silence_libraries()
    if args.out is not None:
        check_place(args.out)
    plan = halfplate.plan(args.model, recipe, args.benchmark, args.workers or 1)
    refused = refusal(plan, args.out, args.workers or 1)
    if args.json:
        print_json(plan.to_json() | {"refusal": refused, "choice": dict(rows_of(choice, minutes))})
    else:
        _print(plan, rows_of(choice, minutes), refused)
    return 0


def _print(plan: "Plan", choice: list[tuple[str, str]], refused: str | None) -> None:
    from halfplate.cli.console import print_pairs, print_table

    entries = [matrix.to_json() for matrix in plan.matrices]
    print_table(
        f"{plan.model}: {len(plan.specs)} matrices to compress by {plan.recipe.method}",
        ("name", "format", "core", "shape", "original bytes", "bytes", "GFLOP", "MB held", "s", "why skipped"),
        [
            (
                entry["name"],
                entry["format"],
                "-" if entry["skipped"] else f"{entry['pattern']} {entry['core_dtype']}",
                "×".join(map(str, entry["shape"])) if entry["shape"] else "-",
                entry["dense_nbytes"],
                entry["nbytes"],
                None if entry["skipped"] else round(entry["flops"] / 1e9, 3),
                None if entry["skipped"] else round(entry["memory_bytes"] / 1e6),
                entry["seconds"],
                entry["reason"] or "",
            )
            for entry in entries
        ],
    )
    warnings = [("warning", warning) for warning in plan.warnings]
    print_pairs(
        "total",
        [*choice, *_bytes(plan), *_needs(plan), ("fits", f"no: {refused}" if refused else "yes"), *warnings],
    )


def _bytes(plan: "Plan") -> list[tuple[str, str]]:
    from halfplate.cli.console import megabytes, whole_checkpoint
    from halfplate.cli.wishes import kernels, served

    share = f"{plan.wrapper_share:.1%} of the original parameters"
    compressed = [
        ("matrices, compressed", f"{megabytes(plan.nbytes)} ({plan.nbytes / plan.dense_nbytes:.1%})"),
        ("wrappers", f"blocks of {plan.block_size}, {share}" if plan.block_size else "none"),
    ]
    if plan.recipe.budgeted:
        most = plan.nbytes_at_most
        share = "" if plan.recipe.budget is None else f" ({plan.recipe.budget:.1%})"
        within = f"{plan.recipe.time_budget:.1%} of the decode time" if most is None else f"{megabytes(most)}{share}"
        compressed = [
            *_limit(plan),
            (
                "matrices, compressed",
                f"within {within}; the run chooses the format of each matrix, the table shows the initial ones",
            ),
        ]
    return [
        ("share of the decoder that is compressed", f"{plan.decoder_share:.1%} of its parameters"),
        *([] if plan.experts is None else [("experts", _experts(plan.experts))]),
        ("matrices, original at 2 bytes per weight", megabytes(plan.dense_nbytes)),
        *compressed,
        *(
            [("N of M by layer", "chosen in the run; the average is this pattern")]
            if plan.recipe.ratios == "owl"
            else []
        ),
        *([("calibration text", _text(plan))] if plan.job.runs_text else []),
        ("optimised for", served(plan.recipe)),
        ("kernels", kernels(plan.recipe.target, plan.without_kernel)),
        ("everything else", megabytes(plan.other_nbytes)),
        *(
            []
            if plan.nbytes_at_most is None or plan.recipe.asks_size
            else [("whole checkpoint", whole_checkpoint(plan.nbytes_at_most, plan.dense_nbytes, plan.other_nbytes))]
        ),
        ("source weight files", megabytes(plan.source_nbytes)),
    ]


def _limit(plan: "Plan") -> list[tuple[str, str]]:
    """What the formats are chosen within and among, and what decides."""
    from halfplate.allocation import fields_of
    from halfplate.cli.console import megabytes
    from halfplate.planning.fitting import in_one_format

    limit, recipe = plan.limit, plan.recipe
    if limit is None:
        return []
    rows = []
    if recipe.asks_size:
        rows += [(f"asked for, {limit.spoken}", megabytes(limit.total))]
        rows += [(f"less {part}", megabytes(nbytes)) for part, nbytes in limit.parts.items()]
    if not {"block_size", "pattern"} & fields_of(recipe.choose).keys():
        each = in_one_format(limit, recipe, plan.layer_specs.values(), plan.table_specs.values())
        spoken = "; ".join(
            f"{name} {megabytes(nbytes)}{'' if nbytes <= limit.total else ', too large'}"
            for name, nbytes in each.items()
        )
        rows.append(("if all matrices had one type (columns per scale)", spoken))
    rows.append(
        (
            "decided by",
            "the error of each candidate in each matrix, measured on the calibration text, times the KL that the matrix alone causes (docs/budget.md)",
        )
    )
    return rows


def _experts(found: dict[str, int]) -> str:
    from halfplate.cli.console import megabytes

    text = f"{found['per_layer']} in each of {found['layers']} layers, {found['per_token']} for a token"
    if not found["passes"]:
        return text
    return (
        f"{text}; one is solved at a time from its own tokens: {found['passes']} passes over the {megabytes(found['recorded_bytes'])} that the "
        f"experts of a layer receive, {megabytes(found['gram_bytes'])} of Gram matrices held for each"
    )


def _text(plan: "Plan") -> str:
    from halfplate.calibration.mixture import parts_of, samples_of

    recipe = plan.recipe
    parts = parts_of(recipe.calibration)
    counts = zip(parts, samples_of(parts, recipe.samples), strict=True)
    given = ", ".join(f"{count} from {part.source}{' (generated)' * part.sampled}" for part, count in counts)
    return f"{recipe.samples} sequences of {recipe.seq_len} tokens: {given}"


def _needs(plan: "Plan") -> list[tuple[str, str]]:
    from halfplate.cli.console import duration, megabytes

    rows = [("operations for solving", f"{plan.flops / 1e12:,.2f} TFLOP")]
    if plan.seconds is not None:
        phases = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in plan.seconds.items())
        rows.append(("time in one process, as measured here", f"{duration(sum(plan.seconds.values()))} ({phases})"))
    held, bound = plan.memory, megabytes(plan.memory.bound)
    phases = ", ".join(f"{phase} {megabytes(nbytes)}" for phase, nbytes in held.phases.items())
    rows.append(("peak memory, estimate", f"{megabytes(held.peak)} ({phases})"))
    if held.whole_model:
        rows.append(("holds the whole model", f"{', '.join(held.whole_model)}; without it the bound is {bound}"))
    else:
        rows.append(("memory bound (docs/memory.md)", bound))
    rows += [
        (
            f"transform {step.label}",
            f"{step.told + '; ' if step.told else ''}holds {megabytes(step.memory)}, writes {megabytes(step.disk)} to the work folder"
            f"{', automatic' if step.automatic else ''}",
        )
        for step in plan.transforms
    ]
    rows.append(("disk", f"{megabytes(plan.disk.total)}, {megabytes(plan.disk.work)} of it only during the run"))
    rows += [("note", note) for note in plan.notes]
    return [*rows, ("fingerprint", plan.fingerprint[:16])]
