"""The pictures of a sweep: the loss of every row against its bytes or its decode speed, as a self-contained SVG file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from halfplate.report.pictures import drawing, text
from halfplate.sweeps.records import DONE

WIDTH, HEIGHT = 960, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 40, 52
LETTER, LINE = 6.4, 13.0  # largest font size of names
# Classes as in the style sheet of the report, with its colours.
STYLE = """<style>
svg { --ground: #fffefb; --ink: #20242c; --soft: #646a76; --rule: #e4e1d9; --data: #2f6d7e; font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ground: #1b1f26; --ink: #e6e4de; --soft: #9a9fa9; --rule: #2e343d; --data: #74b6c6; } }
.ground { fill: var(--ground); } .label { fill: var(--soft); font-size: 11.5px; } .figure { fill: var(--ink); font-size: 11.5px; } .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
.rule { stroke: var(--rule); } .edge { fill: none; stroke: var(--soft); stroke-dasharray: 5 4; } .best { fill: var(--data); } .other { fill: var(--ground); stroke: var(--data); stroke-width: 1.5; }
</style>"""


@dataclass(frozen=True)
class Point:
    """A measured row. across: MB, or decode speed relative to the original. loss: KL in nats per token, or perplexity."""

    name: str
    across: float
    loss: float


@dataclass(frozen=True)
class Against:
    """What the loss is drawn against.

    value: of a finished row, None if it was not measured.
    title, axis, unit: in words.
    more: whether more of it is better.
    """

    value: Callable[[Mapping[str, Any]], float | None]
    title: str
    axis: str
    unit: str
    more: bool = False


AGAINST = {
    "bytes": Against(
        lambda row: row["weight_nbytes"] / 1e6,
        "against the bytes of all weights",
        "all weights, MB; below and to the left is better",
        "MB",
    ),
    "speed": Against(
        lambda row: row.get("speed", {}).get("decode_speedup"),
        "against decode speed",
        "decode speed, relative to the original in transformers; below and to the right is better",
        "× original",
        more=True,
    ),
}


@dataclass(frozen=True)
class Axis:
    """Values from `least` to `most`, mapped to the pixels `first` to `last`."""

    least: float
    most: float
    first: float
    last: float
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Sequence[float], first: float, last: float, may_be_logarithmic: bool = False) -> Axis:
        """An axis for the values with some margin; logarithmic if they span more than a factor of ten."""
        least, most = min(values), max(values)
        if may_be_logarithmic and 0 < least * 10 < most:
            return cls(least / 1.3, most * 1.3, first, last, True)
        room = 0.08 * (most - least) or 0.1 * most or 1.0
        return cls(max(least - room, 0.0) if least >= 0 else least - room, most + room, first, last)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        if self.logarithmic:
            share = math.log(value / self.least) / math.log(self.most / self.least)
        else:
            share = (value - self.least) / (self.most - self.least)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values within the axis, four to eight if it is not logarithmic."""
        if self.logarithmic:
            low, high = math.floor(math.log10(self.least)), math.ceil(math.log10(self.most))
            steps = (1, 2, 5) if high - low <= 3 else (1,)
            found = [step * 10.0**power for power in range(low, high + 1) for step in steps]
        else:
            rough = (self.most - self.least) / 8
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
            found = [index * step for index in range(math.ceil(self.least / step), math.floor(self.most / step) + 1)]
        return [value for value in found if self.least <= value <= self.most]


def picture(result: Mapping[str, Any], against: str = "bytes") -> str | None:
    """The SVG file for the JSON object of a sweep; None if no compressed row has a loss. against: a key of `AGAINST`."""
    rows = [row for row in result["rows"] if row["status"] == DONE and "compression" in row]
    other = AGAINST[against]
    by_kl = _points(rows, "kl", other)
    points = by_kl or _points(rows, "perplexity", other)
    if not points:
        return None
    across = Axis.of([point.across for point in points], LEFT, WIDTH - RIGHT, may_be_logarithmic=other.more)
    up = Axis.of([point.loss for point in points], HEIGHT - BOTTOM, TOP, may_be_logarithmic=True)
    measure = "KL to the original, nats per token" if by_kl else "perplexity"
    pieces = [Markup(STYLE), Markup('<rect class="ground" width="{}" height="{}"/>').format(WIDTH, HEIGHT)]
    title = f"{result['model'].rstrip('/').rpartition('/')[2]}: {measure}, {other.title}"
    pieces += [text(LEFT, 22, title, "start", "figure title"), *_rules(across, up, other)]
    places = {point: (across.at(point.across), up.at(point.loss)) for point in points}
    edge = front(points, other.more)
    line = " ".join(f"{places[point][0]:.1f},{places[point][1]:.1f}" for point in edge)
    pieces.append(Markup('<polyline class="edge" points="{}"/>').format(line))
    for point in sorted(points, key=edge.__contains__):  # draw the best on top
        (x, y), kind = places[point], "best" if point in edge else "other"
        said = f"{point.name}: {point.across:.4g} {other.unit}, {measure} {point.loss:.4g}"
        pieces.append(
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>').format(
                kind, x, y, said
            )
        )
    pieces += _names([*edge, *sorted(set(points) - set(edge), key=lambda point: point.loss)], places)
    drawn = drawing(WIDTH, HEIGHT, title, pieces)
    return str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def front(points: Sequence[Point], more: bool = False) -> list[Point]:
    """The points that no other point beats in both directions, from the best `across`, which is the largest if `more`."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (-one.across if more else one.across, one.loss)):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found


def _points(rows: Sequence[Mapping[str, Any]], measure: str, against: Against) -> list[Point]:
    found = [(row["name"], against.value(row), row["evaluation"].get(measure)) for row in rows]
    return [
        Point(name, across, loss)
        for name, across, loss in found
        if across is not None and loss is not None and math.isfinite(loss)
    ]


def _rules(across: Axis, up: Axis, against: Against) -> list[Markup]:
    """Ticks with grid lines, and axis labels."""
    pieces = []
    for value in across.ticks():
        pieces.append(text(across.at(value), HEIGHT - BOTTOM + 20, f"{value:g}", "middle"))
    for value in up.ticks():
        y = up.at(value)
        pieces.append(
            Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        )
        pieces.append(text(LEFT - 8, y + 4, f"{value:g}", "end"))
    said = f"{against.axis}, and no row is better than a filled one in both"
    return [*pieces, text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, said, "middle", "figure")]


def _names(points: Sequence[Point], places: Mapping[Point, tuple[float, float]]) -> list[Markup]:
    """Names next to the points, where they cover nothing; other names appear only as the title of the circle."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()]
    pieces = []
    for point in points:
        x, y = places[point]
        width = LETTER * len(point.name)
        for left, middle, anchor, at in (
            (x + 9, y, "start", x + 9),
            (x - 9 - width, y, "end", x - 9),
            (x - width / 2, y - 14, "middle", x),
            (x - width / 2, y + 14, "middle", x),
            (x + 7, y - 12, "start", x + 7),
            (x + 7, y + 12, "start", x + 7),
        ):
            box = (left, middle - LINE / 2, left + width, middle + LINE / 2)
            inside = box[0] >= LEFT and box[1] >= TOP - 8 and box[2] <= WIDTH and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                pieces.append(text(at, middle + 4, point.name, anchor, "figure"))
                break
    return pieces


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
