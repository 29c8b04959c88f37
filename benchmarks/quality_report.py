"""The sections of RESULTS.md on quality and their pictures, from what has been measured alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import quality_pictures
from common import ROOT, table, write_section
from quality_results import Results
from quality_rows import LlamaCpp, Recovered, Row, Run, described, format_of, rows
from quality_subjects import Subject

DASH = "–"
PICTURES = ROOT / "docs" / "pictures"
TASKS = {"piqa": "acc", "arc_easy": "acc", "openbookqa": "acc_norm", "hellaswag": "acc_norm"}
TASK_NAMES = {"piqa": "PIQA", "arc_easy": "ARC-Easy", "openbookqa": "OpenBookQA", "hellaswag": "HellaSwag"}
TEXT_NAMES = {"test": "WikiText-2 test", "valid": "valid", "c4": "C4", "stories": "TinyStories"}
Measured = Mapping[str, dict[str, Any]]


def write(subject: Subject, results: Results, file: Path | None = None) -> None:
    """Draw the pictures of a subject and write its section into RESULTS.md."""
    listed = rows(subject.block, subject.recovery_minutes)
    found = measured(listed, results)
    pictures = quality_pictures.draw(subject, points(subject, listed, found), PICTURES)
    text = section(subject, listed, found, pictures)
    write_section(f"quality_{subject.name}", text, **({"file": file} if file else {}))


def measured(listed: list[Row], results: Results) -> Measured:
    """What still holds of every row, by its label."""
    by_label = {row.label: row for row in listed}
    entries = {label: described(row, by_label) for label, row in by_label.items()}
    stages = ("compression", "quality", "fit", "tasks", "decode", "refused")
    found = {
        label: {stage: found for stage in stages if (found := results.stage(label, stage, made)) is not None}
        for label, made in entries.items()
    }
    return _with_speed_of_format(entries, found)


def _with_speed_of_format(entries: Mapping[str, dict[str, Any]], found: Measured) -> Measured:
    """Every measured row whose decoding was not timed has that of the first timed row of the same format, and its name as `of`."""
    timed: dict[Any, str] = {}
    formats = {label: format_of(made) for label, made in entries.items()}
    for label, stored in formats.items():
        if stored is not None and "decode" in found[label]:
            timed.setdefault(stored, label)
    return {
        label: entry | {"decode": found[of]["decode"] | {"of": of}}
        if "quality" in entry and "decode" not in entry and (of := timed.get(formats[label])) is not None
        else entry
        for label, entry in found.items()
    }


def section(subject: Subject, listed: list[Row], found: Measured, pictures: list[Path]) -> str:
    """Everything below the heading of one model."""
    parts = [
        f"`python benchmarks/quality.py --model {subject.name}`, then `--stage tasks`, `--stage decode`, `--report`",
        main_table(subject, listed, found),
        legend(subject, found),
        *(f"![{subject.title}: {path.stem}]({path.relative_to(ROOT)})" for path in pictures),
        "**What the table says**",
        figures_table(subject, found),
        "**One setting at a time**",
        *(ablation_table(subject, name, listed, found) for name in ablation_names(listed)),
    ]
    return "\n\n".join(parts)


# The main table.


def main_table(subject: Subject, listed: list[Row], found: Measured) -> str:
    """Every row that stands in a group, group by group."""
    header = ["row", "linears, MB", "of dense", "layer error", *_text_header(subject), *TASK_NAMES.values()]
    header += ["decode, tokens/s", "× dense", "× in our loop", "calibration or training tokens", "made in, s (load)"]
    lines: list[list[str]] = []
    groups = list(dict.fromkeys(row.group for row in listed if row.group))
    for group in groups:
        lines.append([f"**{group}**", *[""] * (len(header) - 1)])
        for row in (row for row in listed if row.group == group):
            lines.append([_named(row, found[row.label]), *main_cells(subject, row, found[row.label])])
    return table(header, lines)


def main_cells(subject: Subject, row: Row, entry: dict[str, Any]) -> list[str]:
    quality, decode = entry.get("quality", {}), entry.get("decode", {})
    accuracies = entry.get("tasks", {}).get("accuracies", {})
    nbytes = quality.get("nbytes")
    return [
        number(nbytes and nbytes / 1e6, ".1f" if (nbytes or 0) > 1e7 else ".3f"),
        number(nbytes and nbytes / quality["dense_nbytes"], ".3f"),
        number(quality.get("layer_error"), ".4f"),
        *_text_cells(subject, quality),
        *(number(accuracies.get(task, {}).get(measure), ".3f") for task, measure in TASKS.items()),
        *(
            f"({cell})" if "of" in decode else cell
            for cell in (
                number(decode.get("decode"), ".0f"),
                number(decode.get("speedup"), ".2f"),
                number(decode.get("over_same_loop"), ".2f"),
            )
        ),
        _tokens(subject, entry.get("compression", {})),
        _seconds(entry.get("compression", {})),
    ]


def _named(row: Row, entry: dict[str, Any]) -> str:
    """The label, why the row is refused, and how far its task rows go where it is not the usual number."""
    if "refused" in entry and "quality" not in entry:
        return f"{row.label} (refused: {entry['refused']['reason'].partition(';')[0]})"
    return row.label


def _text_header(subject: Subject) -> list[str]:
    header = []
    for name in subject.texts:
        header.append(f"{TEXT_NAMES[name]}: perplexity")
        header.append("KL")
        if name == subject.reported:
            header.append("top-1")
    return header


def _text_cells(subject: Subject, quality: dict[str, Any]) -> list[str]:
    cells = []
    for name in subject.texts:
        scores = quality.get(name, {})
        dense = bool(scores) and "kl" not in scores
        cells.append(number(scores.get("perplexity"), ".2f", gone="∞" if scores else DASH))
        cells.append("0" if dense else number(scores.get("kl"), ".4f" if (scores.get("kl") or 1) < 0.05 else ".3f"))
        if name == subject.reported:
            cells.append("1" if dense else number(scores.get("top1_agreement"), ".3f"))
    return cells


def _tokens(subject: Subject, making: dict[str, Any]) -> str:
    if not making.get("tokens"):
        return "0" if making else DASH
    names = {"text": subject.field, "c4": "C4", "self": "its own"}
    return f"{making['tokens']:,}, {names[making['text']]}"


def _seconds(making: dict[str, Any]) -> str:
    return f"{making['seconds']:.0f} ({making['load_before'][0]:.1f})" if "seconds" in making else DASH


def number(value: float | None, how: str, gone: str = DASH) -> str:
    """A number as it stands in a table; what is not measured is a dash."""
    return gone if value is None else format(value, how)


def legend(subject: Subject, found: Measured) -> str:
    """What the columns mean, and what flatters whom."""
    windows = ", ".join(f"{TEXT_NAMES[name]} {text.windows}" for name, text in subject.texts.items())
    sentences = [
        f"Windows of {subject.seq_len} tokens that do not overlap, no start token beyond the tokenizer's: {windows}. C4 is the last 200 documents of the file"
        + (", TinyStories the last 200 stories" if "stories" in subject.texts else "")
        + "; nothing is calibrated or trained on them. *valid* is for choices, the others were read once for each row.",
        "KL is KL(dense ‖ row) in nats a token over the whole vocabulary, top-1 the share of tokens with the same likeliest next one. The layer error is "
        "tr(D H Dᵀ) / tr(W H Wᵀ), a mean over the matrices, with the second moments H of the inputs in the *dense* model on *valid*, a token's energy limited to 10 "
        "medians: the same judge for every method, whatever it was calibrated on.",
        "Accuracies are lm-eval's: acc for PIQA and ARC-Easy, acc_norm for OpenBookQA and HellaSwag, zero-shot, the first "
        + _task_rows(found)
        + " rows of each, with matrices multiplied as bf16 and summed in fp32; a llama.cpp row is scored with the weights of its file. "
        "Decoding alternates with the dense model in transformers (fp32 and bf16, × the faster), and with its weights in bf16 in Halfplate's own loop, "
        "which is what the weights alone give; Halfplate's rows have float activations unless they say otherwise. Figures in brackets are those of the timed row that "
        "is stored in the same format.",
        "llama.cpp's rows come from an F16 file of the same weights, its own quantiser with its defaults, and are run by llama.cpp, "
        "which quantises activations too; their embedding, which is also the head, is quantised, ours is not"
        + _types(found)
        + ".",
        "Seconds are those of a machine that others used as well: the load average at the start stands beside them.",
    ]
    if subject.on_a_grid:
        sentences.append(subject.on_a_grid)
    machine = next((entry["compression"]["machine"] for entry in found.values() if "compression" in entry), None)
    return " ".join(sentences) + (f"\n\n{machine.rpartition(', load')[0]}." if machine else "")


def _task_rows(found: Measured) -> str:
    limits = {entry["tasks"]["protocol"]["limit"] for entry in found.values() if "tasks" in entry}
    return " or ".join(f"{limit:,}" for limit in sorted(limits)) or "1,000"


def _types(found: Measured) -> str:
    """Which types llama.cpp's files really hold."""
    spoken = []
    for label, entry in found.items():
        if "types" in entry.get("quality", {}):
            types = ", ".join(f"{count} {kind}" for kind, count in entry["quality"]["types"].items())
            spoken.append(
                f"{label.removeprefix('llama.cpp ')} has linears in {types} and the embedding in {entry['quality']['embedding']}"
            )
    return f" ({'; '.join(spoken)}: K-quants need rows of a multiple of 256 and fall back elsewhere)" if spoken else ""


# The figures that issue and readers ask for.


def figures_table(subject: Subject, found: Measured) -> str:
    """Ratios between rows; a dash where one of them is not measured."""
    minutes = f"{subject.recovery_minutes:g} minutes of recovery"

    def text(label: str, name: str, measure: str = "perplexity") -> float | None:
        return found.get(label, {}).get("quality", {}).get(name, {}).get(measure)

    def error(label: str) -> float | None:
        return found.get(label, {}).get("quality", {}).get("layer_error")

    def fit(label: str) -> float | None:
        return found.get(label, {}).get("fit", {}).get("layer_error")

    def solving(label: str) -> float | None:
        return (found.get(label, {}).get("compression", {}).get("phases") or {}).get("solving")

    rival = best(found, [label for label in found if label.startswith("sparsegpt") and "damping" in label])  # of 2:4
    judged = subject.reported
    named = TEXT_NAMES[judged]
    harm = ratio(text("armor int4", judged, "kl"), text("armor int4, rounded after the fact", judged, "kl"))
    lines = [
        [
            "layer error on the calibration text, `gram` over `diag`, dense inputs, same bytes",
            ratio(fit("armor, dense inputs"), fit("armor, diag, dense inputs")),
        ],
        [
            "the same on held-out text",
            ratio(error("armor, dense inputs"), error("armor, diag, dense inputs")),
        ],
        [
            f"perplexity ({named}), ARMOR over the best SparseGPT on valid ({rival or DASH})",
            ratio(text("armor", judged), text(rival or "", judged)),
        ],
        ["the same, ARMOR with block tuning", ratio(text("armor, tuned", judged), text(rival or "", judged))],
        [
            f"perplexity ({named}) after {minutes}, over dense",
            ratio(text(f"armor, tuned, {minutes}", judged), text("dense", judged)),
        ],
        [
            "calibrated on its own text over on C4: perplexity on C4",
            ratio(text("armor, self", "c4"), text("armor, C4", "c4")),
        ],
        [f"the same on {TEXT_NAMES['test']}", ratio(text("armor, self", "test"), text("armor, C4", "test"))],
        [f"perplexity ({named}), int8 core over bf16", ratio(text("armor int8", judged), text("armor", judged), ".4f")],
        [f"KL ({named}), int4 in the solver over rounded after the fact", harm],
        [
            "layer error, dense int3, our sweep over GPTQ, groups of 128",
            ratio(error("armor dense int3, no wrappers"), error("gptq int3, group 128")),
        ],
        [
            "layer error, dense int2 with int8 wrappers, over the log-linear line between int2 and int3 at its bits",
            ratio(error("armor dense int2, int8 wrappers"), line_between(found)),
        ],
        ["solve time, `gram` over `diag`", ratio(solving("armor, dense inputs"), solving("armor, diag, dense inputs"))],
    ]
    return table(["what", "ratio"], lines)


def best(found: Measured, labels: list[str], text: str = "valid") -> str | None:
    """The row of least perplexity on `text`, by which choices are made; None where none is measured."""
    scored = {
        label: found[label]["quality"][text]["perplexity"]
        for label in labels
        if found[label].get("quality", {}).get(text, {}).get("perplexity") is not None
    }
    return min(scored, key=scored.__getitem__) if scored else None


def ratio(ours: float | None, theirs: float | None, how: str = ".3f") -> str:
    return DASH if ours is None or not theirs else format(ours / theirs, how)


def line_between(found: Measured) -> float | None:
    """The layer error that int2 and int3 without wrappers would have at the bits of int2 with int8 wrappers."""
    qualities = [
        found.get(label, {}).get("quality")
        for label in (
            "armor dense int2, no wrappers",
            "armor dense int3, no wrappers",
            "armor dense int2, int8 wrappers",
        )
    ]
    if not all(qualities):
        return None
    (low, high, at) = ((one["nbytes"], math.log(one["layer_error"])) for one in qualities if one)
    return math.exp(low[1] + (high[1] - low[1]) * (at[0] - low[0]) / (high[0] - low[0]))


# Ablations.


def ablation_names(listed: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in listed for name in row.ablations))


def ablation_table(subject: Subject, name: str, listed: list[Row], found: Measured) -> str:
    """One setting in all its values, numbers in rising order."""

    def leading(setting: str) -> float:
        try:
            return float(setting.split()[0].replace(",", ""))
        except ValueError:
            return math.inf

    members = sorted((row for row in listed if name in row.ablations), key=lambda row: leading(row.ablations[name]))
    header = [name, "linears, of dense", "layer error", *_text_header(subject), "made in, s (load)"]
    lines = []
    for row in members:
        entry = found[row.label]
        quality = entry.get("quality", {})
        share = quality and quality["nbytes"] / quality["dense_nbytes"]
        lines.append(
            [
                row.ablations[name],
                number(share or None, ".3f"),
                number(quality.get("layer_error"), ".4f"),
                *_text_cells(subject, quality),
                _seconds(entry.get("compression", {})),
            ]
        )
    return table(header, lines)


# The pictures.


def points(subject: Subject, listed: list[Row], found: Measured) -> list[quality_pictures.Point]:
    """What is drawn: every measured row of the main table but the dense one, whose KL is 0."""
    drawn = []
    for row in listed:
        entry = found[row.label]
        kl = entry.get("quality", {}).get(subject.reported, {}).get("kl")
        if row.group and kl:
            decode = entry.get("decode", {}).get("decode")
            drawn.append(quality_pictures.Point(row.label, family(row), entry["quality"]["nbytes"], decode, kl))
    return drawn


def family(row: Row) -> str:
    """The colour of a row."""
    if isinstance(row.making, LlamaCpp):
        return "llama.cpp"
    if isinstance(row.making, Recovered):
        return "recovered"
    kind = "dense core" if row.group == "dense on a grid" else "2:4"
    ours = row.label.startswith("armor") or (isinstance(row.making, Run) and row.making.parent.startswith("armor"))
    if row.group.endswith("budget"):
        return "ARMOR, budget"
    return f"ARMOR, {kind}" if ours else f"other methods, {kind}"
