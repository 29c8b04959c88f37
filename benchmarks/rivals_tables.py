"""The tables and pictures of benchmarks/rivals.py."""

from collections.abc import Mapping
from typing import Any

from common import ROOT, table

from halfplate.sweeps.picture import picture
from halfplate.sweeps.records import DONE, FAILED

HEADER = ["system", "form", "all weights, MB", "of original", "KL", "top-1", "decode, × original", "made in, s"]


def rendered(
    result: Mapping[str, Any],
    places: Mapping[str, Mapping[float, str]],
    files: list[dict[str, Any]],
    limits: Mapping[float, float],
) -> str:
    """A table for each size, best first; rows that failed are told below, and rotations in a table of their own."""
    rows = {row["name"]: row for row in result["rows"]}
    whole = result["original_weight_nbytes"]
    parts = []
    for share, limit in limits.items():
        lines = [
            _cells(system, rows[name], whole)
            for system, at in places.items()
            for asked, name in at.items()
            if rows[name]["status"] == DONE and share == _place(asked, rows[name], limits)
        ]
        fitting = [file for file in files if _smallest(file["nbytes"], limits) == share]
        lines += [_file_cells(file, whole) for file in fitting]
        if lines:
            lines.sort(key=lambda cells: float(cells[4]))
            heading = f"**{share:g} of the linears, at most {limit / whole:.3f} of the whole model**"
            parts.append(f"{heading}\n\n{table(HEADER, lines)}")
    rotated = [name for name in rows if name.endswith(", rotated") and rows[name]["status"] == DONE]
    pairs = [
        (name, next(at[min(at)] for system, at in places.items() if name == f"{system}, rotated")) for name in rotated
    ]
    lines = [_rotation(rows[name], rows[plain]) for name, plain in pairs if rows[plain]["status"] == DONE]
    if lines:
        head = ["system", "linears, of original", "KL as it is", "KL rotated", "ratio"]
        parts.append(f"**Rotated first (`--transforms rotate`)**\n\n{table(head, lines)}")
    failed = [f"- {name}: {row['why']}" for name, row in rows.items() if row["status"] == FAILED]
    if failed:
        parts.append("Refused:\n\n" + "\n".join(failed))
    return "\n\n".join(parts)


def _place(asked: float, row: Mapping[str, Any], limits: Mapping[float, float]) -> float:
    """The size whose table a row is in: the one that it was made for, or, of a whole file, the smallest that it fits."""
    whole = not row["made"].get("pruned") and "embedding_dtype" in row["made"]["recipe"]
    return _smallest(row["weight_nbytes"], limits) if whole else asked


def _smallest(nbytes: int, limits: Mapping[float, float]) -> float:
    fitting = [share for share, limit in limits.items() if nbytes <= limit]
    return min(fitting, default=max(limits))


def _cells(system: str, row: Mapping[str, Any], whole: int) -> list[str]:
    scores, nbytes = row["evaluation"], row["weight_nbytes"]
    seconds = row["compression"]["seconds"]["total"]
    made = f"> {seconds:.0f}" if row["compression"]["continued"] else f"{seconds:.0f}"
    form = _form(row["made"])
    return [
        system,
        form,
        f"{nbytes / 1e6:.4g}",
        f"{nbytes / whole:.3f}",
        f"{scores['kl']:.4g}",
        f"{scores['top1_agreement']:.1%}",
        f"{row['speed']['decode_speedup']:.2f}",
        made,
    ]


def _file_cells(file: Mapping[str, Any], whole: int) -> list[str]:
    scores = [f"{file['kl']:.4g}", f"{file['top1_agreement']:.1%}", f"{file['speedup']:.2f}"]
    return [file["name"], file["contents"], f"{file['nbytes'] / 1e6:.4g}", f"{file['nbytes'] / whole:.3f}", *scores, ""]


def _form(made: Mapping[str, Any]) -> str:
    """What a recipe makes, in a few words."""
    recipe = made["recipe"]
    if made.get("pruned"):
        return f"keeps {recipe['keep']:.3f} of the parameters"
    if recipe["pattern"] == "none":
        return f"share {recipe['method_options']['share']:g}"
    words = [recipe["pattern"], recipe["core_dtype"]]
    words += [f"groups of {recipe['group_size']}"] if recipe["core_dtype"] != "bf16" else []
    words += [f"blocks of {recipe['block_size']}"] if recipe["block_size"] not in ("auto", 0) else []
    return ", ".join(words)


def _rotation(rotated: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    before, after = plain["evaluation"]["kl"], rotated["evaluation"]["kl"]
    share = f"{plain['linear_share']:.3f}"
    return [rotated["name"].removesuffix(", rotated"), share, f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f}"]


def pictures(model: str, result: Mapping[str, Any], files: list[dict[str, Any]]) -> str:
    """Draw KL against bytes and against decode speed into docs/pictures; returns the Markdown that shows them."""
    done = [row for row in result["rows"] if row["status"] == DONE and "kl" in row["evaluation"]]
    done = [row for row in done if not row["name"].endswith(", rotated")]
    points = [(row["name"], row["weight_nbytes"], row["evaluation"]["kl"], _speed(row)) for row in done]
    points += [(file["name"], file["nbytes"], file["kl"], file["speedup"]) for file in files]
    rows = [
        {
            "name": name,
            "status": DONE,
            "compression": {},
            "weight_nbytes": nbytes,
            "evaluation": {"kl": kl},
            "speed": {"decode_speedup": speed},
        }
        for name, nbytes, kl, speed in points
    ]
    told = []
    for against in ("bytes", "speed"):
        drawn = picture({"model": model, "rows": rows}, against=against)
        file = f"docs/pictures/rivals_{model}_{against}.svg"
        if drawn is not None:
            (ROOT / file).write_text(drawn, encoding="utf-8")
            told.append(f"![KL against {against}]({file})")
    return "\n\n".join(told)


def _speed(row: Mapping[str, Any]) -> float:
    return float(row["speed"]["decode_speedup"])
