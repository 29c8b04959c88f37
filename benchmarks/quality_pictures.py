"""Two pictures a model: KL to the dense model against bytes, and against decode speed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_subjects import Subject

COLOURS = {
    "ARMOR, 2:4": "#1f6fb4",
    "recovered": "#0b3c6f",
    "ARMOR, dense core": "#2a9d5c",
    "ARMOR, budget": "#8b5fbf",
    "other methods, 2:4": "#6b6b6b",
    "other methods, dense core": "#a66a00",
    "llama.cpp": "#d1342f",
}
MARKERS = {"llama.cpp": "D", "recovered": "*", "other methods, 2:4": "s", "other methods, dense core": "^"}
LABELLED = 18  # rows named in a picture: the front first, then llama.cpp, then the others by KL


@dataclass(frozen=True)
class Point:
    """A measured row. decode: tokens a second, None where not measured. kl: nats a token."""

    label: str
    family: str
    nbytes: int
    decode: float | None
    kl: float


def draw(subject: Subject, points: list[Point], folder: Path) -> list[Path]:
    """Draw what there are points for as SVG; returns the files."""
    timed = [(point, point.decode) for point in points if point.decode]
    made = []
    if points:
        # With int8 activations a row has the same bytes and nearly the same KL.
        sized = [(point, point.nbytes / 1e6) for point in points if not point.label.endswith("int8 activations")]
        made.append(folder / f"quality_{subject.name}_bytes.svg")
        _picture(subject, sized, "bytes of the linears, MB", True, made[-1])
    if timed:
        made.append(folder / f"quality_{subject.name}_speed.svg")
        _picture(subject, timed, "decode, tokens a second", False, made[-1])
    return made


def front(points: list[tuple[Point, float]], less_is_better: bool) -> list[tuple[Point, float]]:
    """The points that no other one beats in both KL and x, from the cheapest on."""
    found: list[tuple[Point, float]] = []
    for point, x in sorted(points, key=lambda one: (one[1] if less_is_better else -one[1], one[0].kl)):
        if not found or point.kl < found[-1][0].kl:
            found.append((point, x))
    return found


def _picture(subject: Subject, points: list[tuple[Point, float]], axis: str, less: bool, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": "halfplate", "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(10, 6.5), facecolor="white")
        axes.set_facecolor("white")
        for family, colour in COLOURS.items():
            members = [(x, point.kl) for point, x in points if point.family == family]
            if members:
                size = 130 if family == "recovered" else 46
                axes.scatter(
                    *zip(*members, strict=True),
                    s=size,
                    color=colour,
                    marker=MARKERS.get(family, "o"),
                    label=family,
                    zorder=3,
                    edgecolors="white",
                    linewidths=0.6,
                )
        edge = front(points, less)
        axes.plot([x for _, x in edge], [point.kl for point, _ in edge], color="#555555", lw=1, ls="--", zorder=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(axis)
        axes.set_ylabel(f"KL to the dense model, nats a token ({subject.reported_text})")
        axes.set_title(f"{subject.title}: the lower the better, the further {'left' if less else 'right'} the better")
        axes.grid(True, which="major", color="#dddddd", lw=0.6, zorder=0)
        axes.margins(x=0.12, y=0.1)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(loc="best", frameon=True, framealpha=0.9, fontsize=9)
        _label(figure, axes, points, edge)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


def _label(figure: Any, axes: Any, points: list[tuple[Point, float]], edge: list[tuple[Point, float]]) -> None:
    """Names beside the points, each where it covers no other name and no point; one that finds no place is left out."""
    named = [*edge, *(one for one in points if one[0].family == "llama.cpp")]
    named += sorted(points, key=lambda one: one[0].kl)
    named = list({point.label: (point, x) for point, x in named}.values())[:LABELLED]
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    spots = [axes.transData.transform((x, point.kl)) for point, x in points]
    taken = [axes.get_legend().get_window_extent(renderer)]
    for point, x in named:
        for dx, dy, horizontal, vertical in PLACES:
            text = axes.annotate(
                point.label,
                (x, point.kl),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
                color=COLOURS[point.family],
            )
            box = text.get_window_extent(renderer).padded(1)
            inside = (
                axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            )
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*s) for s in spots):
                taken.append(box)
                break
            text.remove()


PLACES = (
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, 9, "left", "bottom"),
    (6, -9, "left", "top"),
    (-6, 9, "right", "bottom"),
    (-6, -9, "right", "top"),
)
