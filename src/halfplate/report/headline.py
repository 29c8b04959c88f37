"""The headline table: bytes, quality and speed with their measurement protocol. Values that were not measured are marked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from halfplate.evaluation.verdict import Verdict, verdict_of
from halfplate.report.findings import Findings, mapping, number, text
from halfplate.report.words import NOT_MEASURED, count, percent, short

MEASURES = ("kl", "top1_agreement", "perplexity", "dense_perplexity")
KINDS = {
    "gram": "squared output error on the calibration text (from the Gram matrix), relative to a zero matrix",
    "diagonal": "squared error, weighted by the mean square of each input, relative to a zero matrix",
    "weight": "squared error of the weights, relative to a zero matrix",
}


@dataclass(frozen=True)
class Row:
    """One measurement. protocol: how it was measured, empty if it was not."""

    group: str
    measure: str
    compressed: str
    dense: str
    ratio: str
    protocol: str

    @property
    def measured(self) -> bool:
        return self.compressed != NOT_MEASURED


def headline(found: Findings) -> list[Row]:
    """Every row of the table."""
    return _bytes(found) + _quality(found) + _speed(found)


def tiles(found: Findings) -> list[tuple[str, str]]:
    """The main figures at the top of the page: (figure, description)."""
    chosen = [(percent(found.nbytes / found.dense_nbytes), "of the bytes of the original linears")]
    if (kl := number(found.quality.get("kl"))) is not None:
        chosen.append((short(kl), "KL to the original model, nats per token"))
    elif found.mean_error is not None:
        chosen.append((short(found.mean_error), "mean relative error of a matrix"))
    if (speedup := number(found.speed.get("decode_speedup"))) is not None:
        chosen.append((f"{speedup:.2f}×", "decode speed, relative to the original"))
    if total := found.seconds.get("total"):
        chosen.append((count(total, "seconds"), "to compress"))
    return [*chosen, (f"{len(found.matrices)}", "matrices compressed")]


def verdict(found: Findings) -> Verdict | None:
    """The verdict on the latest measurement; None if there is none, or only the self-check from before a recovery."""
    measures = found.quality if number(found.quality.get("kl")) is not None else found.check
    if found.recoveries and measures is found.check:
        return None
    known = {key: value for key in MEASURES if (value := number(measures.get(key))) is not None}
    return verdict_of(known, found.recipe, found.model, found.folder)


def measuring_command(found: Findings) -> str:
    """The command that makes the missing measurements."""
    return shlex.join(["halfplate", "report", found.folder, "--against", found.model or "ORIGINAL"])


def _bytes(found: Findings) -> list[Row]:
    whole, dense = found.nbytes + found.other_nbytes, found.dense_nbytes + found.other_nbytes
    rows = [
        Row(
            "Bytes",
            "compressed linears",
            count(found.nbytes),
            count(found.dense_nbytes),
            percent(found.nbytes / found.dense_nbytes),
            "all stored tensors, including positions and scales; the original at 2 bytes per weight",
        ),
        Row(
            "Bytes",
            "whole model",
            count(whole),
            count(dense),
            percent(whole / dense),
            f"including embeddings, norms, head and skipped matrices as stored ({count(found.other_nbytes)})",
        ),
    ]
    if found.source_nbytes:
        ratio = percent(whole / found.source_nbytes)
        rows.append(
            Row(
                "Bytes",
                "source files",
                count(whole),
                count(found.source_nbytes),
                ratio,
                "the weight files of the original model",
            )
        )
    return rows


def _quality(found: Findings) -> list[Row]:
    rows = []
    if found.mean_error is not None:
        protocol = KINDS.get(found.error_kind or "", "relative to a zero matrix")
        after = "; before recovery" if found.recoveries else ""
        rows.append(Row("Quality", "mean relative error", short(found.mean_error), "0", "", protocol + after))
    if (kl := number(found.check.get("kl"))) is not None:
        after = "; before recovery" if found.recoveries else ""
        protocol = f"self-check: {number(found.check.get('tokens')) or 0:.0f} tokens of Halfplate's built-in text; full vocabulary{after}"
        rows.append(Row("Quality", "KL to the original, built-in text", short(kl), "0", "", protocol))
    measured = found.quality
    protocol = _text_protocol(found)
    for measure, key, dense in (
        ("KL to the original, nats per token", "kl", "0"),
        ("top-1 agreement", "top1_agreement", "100 %"),
        ("perplexity", "perplexity", _figure(measured, "dense_perplexity")),
    ):
        value = number(measured.get(key))
        if value is None:
            rows.append(Row("Quality", measure, NOT_MEASURED, "", "", ""))
            continue
        ratio = ""
        if key == "perplexity" and (beside := number(measured.get("dense_perplexity"))):
            ratio = percent(value / beside)
        rows.append(
            Row("Quality", measure, percent(value) if key == "top1_agreement" else short(value), dense, ratio, protocol)
        )
    return rows


def _text_protocol(found: Findings) -> str:
    measured, protocol = found.quality, mapping(found.quality.get("protocol"))
    source = protocol.get("source", measured.get("text"))
    what = "text that the original model generated" if source == "self" else f"{text(source) or 'text'}"
    seed = f", seed {protocol['seed']} (calibration used another)" if source == "self" and "seed" in protocol else ""
    return f"{measured.get('windows')} windows of {measured.get('seq_len')} tokens of {what}{seed}; full vocabulary"


def _speed(found: Findings) -> list[Row]:
    measured, dense = found.speed, mapping(found.speed.get("dense"))
    rows = []
    for measure, key, ratio in (
        ("decode, tokens per second", "decode_tokens_per_s", "decode_speedup"),
        ("prefill, tokens per second", "prefill_tokens_per_s", "prefill_speedup"),
    ):
        if number(measured.get(key)) is None:
            rows.append(Row("Speed", measure, NOT_MEASURED, "", "", ""))
            continue
        times = number(measured.get(ratio))
        rows.append(
            Row(
                "Speed",
                measure,
                _figure(measured, key),
                _figure(dense, key),
                "" if times is None else f"{times:.2f}×",
                _speed_protocol(measured, dense),
            )
        )
    return rows


def _speed_protocol(measured: dict[str, Any], dense: dict[str, Any]) -> str:
    load = number(measured.get("load_average"))
    busy = "" if load is None else f", load {load:.1f}"
    return (
        f"one sequence, prompt of {measured.get('prompt')} tokens, {measured.get('new_tokens')} new tokens, median of {measured.get('rounds')} alternating rounds, "
        f"{measured.get('threads')} threads{busy}; the original in transformers in {dense.get('dtype', 'fp32')}, the faster of fp32 and bf16"
    )


def _figure(measures: dict[str, Any], key: str) -> str:
    value = number(measures.get(key))
    return "" if value is None else short(value)
