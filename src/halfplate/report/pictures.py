"""Pictures as inline SVG. Colours are classes of the style sheet, so light, dark and print versions each have their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from halfplate.plain_text import visible
from halfplate.report.findings import Matrix
from halfplate.report.words import count, percent, short

SHADES = 9  # .h0 to .h8 of the style sheet
CELL_HEIGHT = 26
LABEL_WIDTH = 92
WIDTH = 960
POINTS = 60  # most points per curve; longer curves are thinned out
PANEL_WIDTH, PANEL_HEIGHT = 240, 160
BAR_WIDTH, BAR_HEIGHT = 410, 26
LEAST_RATIO = 1e-4  # lower end of the loss scale


@dataclass(frozen=True)
class Scale:
    """A colour scale of a positive quantity.

    open: some values exceed `most` and share its shade, so that the others can be told apart.
    logarithmic: most values are near the lower end, so equal ratios get equal steps.
    """

    least: float
    most: float
    open: bool = False
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """The scale that distinguishes these values best."""
        ordered = sorted(values)
        least, most, usual = ordered[0], ordered[-1], 3 * ordered[int(0.95 * (len(ordered) - 1))]
        opened = most > 3 * usual > 0
        most = usual if opened else most
        return cls(least, most, opened, least > 0 and median(values) < (least + most) / 4)

    def shade(self, value: float) -> int:
        """0 for the smallest value to SHADES - 1 for the largest."""
        if value >= self.most > self.least:
            return SHADES - 1
        if self.most <= self.least:
            return 0
        if self.logarithmic:
            place = math.log(max(value, self.least) / self.least) / math.log(self.most / self.least)
        else:
            place = (value - self.least) / (self.most - self.least)
        return min(int(place * SHADES), SHADES - 1)

    def bounds(self) -> list[float]:
        """The SHADES + 1 bounds of the shades."""
        steps = [index / SHADES for index in range(SHADES + 1)]
        if self.logarithmic:
            return [self.least * (self.most / self.least) ** step for step in steps]
        return [self.least + (self.most - self.least) * step for step in steps]


def heat_map(matrices: Sequence[Matrix], kinds: Sequence[str]) -> Markup | None:
    """Relative error of every matrix, one column per layer and one row per linear, with a legend; None without errors."""
    placed = [(m, m.block, m.relative_error) for m in matrices if m.block is not None and m.relative_error is not None]
    if not placed:
        return None
    blocks = sorted({block for _, block, _ in placed})
    scale = Scale.of([error for *_, error in placed])
    cell = min(max((WIDTH - LABEL_WIDTH) / len(blocks), 14.0), 64.0)
    width, height = LABEL_WIDTH + cell * len(blocks), CELL_HEIGHT * len(kinds)
    pieces = []
    for row, kind in enumerate(kinds):
        pieces.append(text(LABEL_WIDTH - 10, row * CELL_HEIGHT + CELL_HEIGHT / 2 + 4, kind, "end"))
    for matrix, block, error in placed:
        x, y = LABEL_WIDTH + blocks.index(block) * cell, kinds.index(matrix.kind) * CELL_HEIGHT
        pieces.append(
            Markup(
                '<rect class="cell h{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"><title>{}: {}</title></rect>'
            ).format(scale.shade(error), x + 1, y + 1, cell - 2, CELL_HEIGHT - 2, visible(matrix.name), short(error))
        )
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= 30 or step == 100)
    for column, block in enumerate(blocks):
        if column % step == 0:
            pieces.append(text(LABEL_WIDTH + (column + 0.5) * cell, height + 16, str(block), "middle"))
    pieces.append(text(LABEL_WIDTH - 10, height + 16, "layer", "end"))
    pieces += _legend(scale, height + 38)
    return drawing(
        max(width, LABEL_WIDTH + 420), height + 78, "Relative error of every matrix, by layer and linear", pieces
    )


def _legend(scale: Scale, top: float) -> list[Markup]:
    width = 40
    pieces = [
        Markup('<rect class="h{}" x="{}" y="{}" width="{}" height="10"/>').format(
            shade, LABEL_WIDTH + shade * width, top, width
        )
        for shade in range(SHADES)
    ]
    pieces.append(text(LABEL_WIDTH - 10, top + 9, "error", "end"))
    for index, bound in enumerate(scale.bounds()):
        if index % 3 == 0:
            more = "+" if scale.open and index == SHADES else ""
            pieces.append(text(LABEL_WIDTH + index * width, top + 26, short(bound) + more, "middle"))
    return pieces


def loss_panels(matrices: Sequence[Matrix], kinds: Sequence[str]) -> list[tuple[str, Markup]]:
    """For every kind of linear: the solver losses of all its matrices, divided by the first loss, and their median."""
    drawn = {
        kind: [_relative(m.losses) for m in matrices if m.kind == kind and len(m.losses) > 1 and m.losses[0] > 0]
        for kind in kinds
    }
    middles = {kind: _median(curves) for kind, curves in drawn.items() if curves}
    least = min((value for middle in middles.values() for _, value in middle), default=1.0)
    decades = max(1, math.ceil(-math.log10(max(least, LEAST_RATIO)) - 1e-9))
    return [(kind, _panel(kind, drawn[kind], middle, decades)) for kind, middle in middles.items()]


def _relative(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(iteration, loss over the first loss), thinned out; the first and last points are kept."""
    step = max(1, math.ceil((len(losses) - 1) / POINTS))
    chosen = sorted({*range(0, len(losses), step), len(losses) - 1})
    return [(index, losses[index] / losses[0]) for index in chosen]


def _panel(kind: str, curves: list[list[tuple[int, float]]], middle: list[tuple[int, float]], decades: int) -> Markup:
    left, right, top, bottom = 38.0, 8.0, 8.0, 24.0
    longest = max(curve[-1][0] for curve in curves)
    room = PANEL_HEIGHT - top - bottom

    def place(index: float, value: float) -> str:
        # A diverging solver leaves the picture; its matrix is listed at the top of the page.
        depth = min(-math.log10(min(max(value, 10.0**-decades), 1.0)), decades)
        return f"{left + index / longest * (PANEL_WIDTH - left - right):.1f},{top + depth / decades * room:.1f}"

    pieces = []
    for decade in range(decades + 1):
        y = top + decade / decades * room
        pieces.append(
            Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                left, PANEL_WIDTH - right, y, y
            )
        )
        pieces.append(text(left - 6, y + 4, f"{10.0**-decade:g}", "end"))
    for index, anchor in ((0, "start"), (longest, "end")):
        x = float(place(index, 1).split(",")[0])
        pieces.append(text(x, PANEL_HEIGHT - 6, str(index), anchor))
    pieces.append(text((left + PANEL_WIDTH - right) / 2, PANEL_HEIGHT - 6, "iteration", "middle"))
    for curve in curves:
        points = " ".join(place(index, value) for index, value in curve)
        pieces.append(Markup('<polyline class="curve" points="{}"/>').format(points))
    pieces.append(Markup('<polyline class="median" points="{}"/>').format(" ".join(place(*point) for point in middle)))
    return drawing(PANEL_WIDTH, PANEL_HEIGHT, f"Losses of the solver for {kind}", pieces)


def _median(curves: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The median of curves of unequal length; a curve that has ended keeps its last value."""
    ends = sorted({index for curve in curves for index, _ in curve})

    def at(curve: list[tuple[int, float]], index: int) -> float:
        return next((value for place, value in reversed(curve) if place <= index), curve[0][1])

    return [(index, median(at(curve, index) for curve in curves)) for index in ends]


@dataclass(frozen=True)
class Bar:
    """One bar of a chart. whole: a paler bar behind it, e.g. the bytes before compression."""

    label: str
    value: float
    said: str
    whole: float | None = None


def bars(chart: Sequence[Bar], title: str) -> Markup | None:
    """Horizontal bars from zero; the longest one has the full width. None if there is nothing to show."""
    longest = max((max(bar.value, bar.whole or 0) for bar in chart), default=0)
    if longest <= 0:
        return None
    label, said = 106, 146
    room = BAR_WIDTH - label - said
    pieces = []
    for row, bar in enumerate(chart):
        y = row * BAR_HEIGHT
        middle = y + BAR_HEIGHT / 2 + 4
        pieces.append(text(label - 8, middle, bar.label, "end"))
        if bar.whole:
            pieces.append(_bar("whole", label, y + 5, bar.whole / longest * room))
        pieces.append(_bar("bar", label, y + 5, bar.value / longest * room))
        end = label + max(bar.value, bar.whole or 0) / longest * room
        pieces.append(text(end + 8, middle, bar.said, "start", "figure"))
    return drawing(BAR_WIDTH, BAR_HEIGHT * len(chart) + 2, title, pieces)


def _bar(kind: str, x: float, y: float, width: float) -> Markup:
    return Markup('<rect class="{}" x="{}" y="{}" width="{:.1f}" height="{}" rx="2"/>').format(
        kind, x, y, max(width, 1), BAR_HEIGHT - 10
    )


def byte_bars(compressed: dict[str, float], dense: dict[str, float]) -> list[Bar]:
    """Bytes of each kind of linear, with those of the original model behind."""
    return [
        Bar(kind, nbytes, f"{count(nbytes)} of {count(dense[kind])}", dense[kind])
        for kind, nbytes in compressed.items()
    ]


def share_bars(parts: dict[str, float], said: str = "bytes") -> list[Bar]:
    """Parts of a total with their shares; said: `bytes` or `seconds`."""
    whole = math.fsum(parts.values())
    return [
        Bar(name, value, f"{count(value, said)}, {percent(value / whole) if whole else '-'}")
        for name, value in sorted(parts.items(), key=lambda part: -part[1])
    ]


def text(x: float, y: float, said: str, anchor: str, kind: str = "label") -> Markup:
    """Text at a point; kind: its classes. Long text is cut, except a `figure`."""
    said = visible(said)
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, said if len(said) <= 16 or "figure" in kind else said[:15] + "…"
    )


def drawing(width: float, height: float, title: str, pieces: Sequence[Markup]) -> Markup:
    """Combine the elements of a picture; title: description for screen readers."""
    return Markup(
        '<svg viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, width, height, visible(title), Markup("").join(pieces))
