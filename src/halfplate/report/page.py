"""The report as one HTML file, which does not use the network and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from halfplate.calibration.routed import in_words
from halfplate.checkpoint.folder import replace_file
from halfplate.plain_text import visible
from halfplate.report.findings import Findings, gather, mapping, number, text
from halfplate.report.headline import headline, measuring_command, tiles, verdict
from halfplate.report.pictures import bars, byte_bars, heat_map, loss_panels, share_bars
from halfplate.report.settings import Measuring
from halfplate.report.words import count, percent, short
from halfplate.telemetry.log import append
from halfplate.telemetry.progress import Report, silent
from halfplate.version import package_version

REPORT_FILE = "report.html"


def write_report(
    folder: str | Path,
    file: str | Path | None = None,
    measuring: Measuring | None = None,
    report: Report = silent,
) -> Path:
    """Write the report of the checkpoint in `folder` to `file` (default `report.html` in it), and return the path of the file.

    measuring: also measure quality and speed against the original model, and add the result to the log of the checkpoint for
        later reports.
    Raises HalfplateError if the checkpoint is incomplete or the file cannot be written.
    """
    place = Path(folder) / REPORT_FILE if file is None else Path(file)
    found = gather(Path(folder))
    if measuring is not None:
        from halfplate.report.measure import measure

        measures = measure(Path(folder), measuring, report)
        append(Path(folder), measures)
        found = found.with_measures(measures)
    replace_file(place, render(found))
    return place


def render(found: Findings) -> str:
    """The page as HTML."""
    style, script = _asset("page.css"), _asset("page.js")
    rows = headline(found)
    return _template().render(
        found=found,
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        title=_title(found),
        lead=_lead(found),
        tiles=tiles(found),
        verdict=verdict(found),
        headline=[(group, list(members)) for group, members in groupby(rows, key=lambda row: row.group)],
        missing=not all(row.measured for row in rows),
        heat_map=heat_map(found.matrices, found.kinds),
        error_words=_error_words(found),
        panels=loss_panels(found.matrices, found.kinds),
        charts=_charts(found),
        facts=_facts(found),
        measuring_command=measuring_command(found),
        version=package_version(),
    )


@cache
def _template() -> Template:
    """The compiled page: compiling takes longer than filling it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=visible)
    environment.globals |= {"head": _head, "figure": _figure, "percent": percent}
    return environment.from_string(_asset("page.html"))


def _asset(name: str) -> str:
    return (files("halfplate.report") / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy that loads nothing and allows only this style and this script."""

    def source(content: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; base-uri 'none'; form-action 'none'"


def _head(title: str, numeric: bool = False) -> Markup:
    """The heading of a sortable column."""
    return Markup('<th scope="col"{}><button type="button">{}</button></th>').format(
        Markup(' class="n"') if numeric else "", title
    )


def _figure(value: float | None) -> Markup:
    """A cell with a number, empty if there is none."""
    if value is None:
        return Markup('<td class="n"></td>')
    return Markup('<td class="n" data-v="{!r}">{}</td>').format(value, short(value))


def _title(found: Findings) -> str:
    return Path(found.model).name if found.model else Path(found.folder).name


def _lead(found: Findings) -> str:
    levels = sorted({matrix.level for matrix in found.matrices})
    how = f"compressed by {found.method}" if found.method else "compressed"
    level = f", {levels[0]}" if len(levels) == 1 else f", {len(levels)} formats"
    when = f" on {found.began[:10]}" if found.began else ""
    again = f", then recovered {found.recoveries}×" if found.recoveries else ""
    return f"{len(found.matrices)} matrices {how}{level}{when}{again}. The checkpoint is {found.folder}."


def _error_words(found: Findings) -> str:
    if found.median_error is None:
        return ""
    worst = found.worst[0]
    tuned = ", before the layers were tuned" if found.recipe is not None and found.recipe.tune_block else ""
    return (
        f"Relative error{tuned}: median {short(found.median_error)}, "
        f"maximum {short(worst.relative_error or 0)} in {worst.name}."
    )


def _charts(found: Findings) -> list[tuple[str, Markup | None, str]]:
    """The charts: (caption, picture, text if there is no picture)."""
    unlogged = "This checkpoint has no log of its run."
    phases = {name: value for name, value in found.seconds.items() if name != "total"}
    return [
        (
            "Bytes by linear, compared with the original at 2 bytes per weight",
            bars(byte_bars(found.total("nbytes"), found.total("dense_nbytes")), "Bytes by linear"),
            "",
        ),
        (
            "Bytes by kind of tensor",
            bars(share_bars({**found.parts, "everything else": found.other_nbytes}), "Bytes by part"),
            "",
        ),
        ("Time by phase", bars(share_bars(phases, "seconds"), "Time by phase"), unlogged),
        (
            "Solving time by linear",
            bars(share_bars(found.total("seconds"), "seconds"), "Solving time by linear"),
            unlogged,
        ),
    ]


def _source(name: str) -> str:
    generated = {"self": "", "self:varied": ", from varied starts"}
    return f"text that the model generated itself{generated[name]}" if name in generated else name


def _shares(sources: Any) -> str:
    """How many sequences each of several sources gave."""
    if not isinstance(sources, list):
        return ""
    texts = [mapping(entry) for entry in sources]
    return " (" + ", ".join(f"{entry.get('samples')} sequences of {entry.get('source')}" for entry in texts) + ")"


def _facts(found: Findings) -> list[tuple[str, str]]:
    """Environment and protocol, as far as they are recorded."""
    calibration = found.calibration
    source = text(calibration.get("source"))
    tokens = number(calibration.get("tokens"))
    told: list[tuple[str, Any]] = [
        ("Machine", found.machine),
        ("Native kernels", found.kernels),
        ("Peak memory", None if found.peak_rss_bytes is None else count(found.peak_rss_bytes)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        (
            "Calibration",
            source
            and f"{_source(source)}{_shares(calibration.get('sources'))}, {calibration.get('samples')} sequences of "
            f"{calibration.get('seq_len')} tokens ({tokens or 0:,.0f}), seed {calibration.get('seed')}",
        ),
        ("Calibration tokens of an expert", in_words(found.routed) if found.routed else None),
        ("Transforms", ", ".join(found.recipe.transforms) if found.recipe is not None else None),
        ("Calibration tokens, SHA-256", text(calibration.get("sha256"))),
        ("Fingerprint of model and recipe", found.fingerprint),
        ("Start", found.began),
    ]
    return [(name, str(value)) for name, value in told if value]
