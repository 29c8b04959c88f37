import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfplate.report.findings import Matrix
from halfplate.report.pictures import SHADES, Bar, Scale, bars, heat_map, loss_panels, share_bars


def matrix(block, kind, error, losses=(), name=None):
    return Matrix(name or f"model.layers.{block}.{kind}", block, kind, "2:4 bf16", "8×8", 80, 128, error, losses, 1.0)


def parsed(picture):
    return ElementTree.fromstring(str(picture))


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40))
def test_shades_rise_with_the_error(values):
    scale = Scale.of(values)
    shades = [scale.shade(value) for value in sorted(values)]
    assert shades == sorted(shades)
    assert 0 <= shades[0] <= shades[-1] < SHADES
    bounds = scale.bounds()
    assert bounds == sorted(bounds)
    for value in values:
        shade = scale.shade(value)
        if scale.least < value < scale.most:
            assert bounds[shade] * (1 - 1e-6) <= value <= bounds[shade + 1] * (1 + 1e-6)


def test_one_outlier_leaves_the_others_apart():
    scale = Scale.of([0.01 * step for step in range(1, 100)] + [1e6])
    assert scale.open
    assert scale.shade(1e6) == SHADES - 1
    assert len({scale.shade(0.01 * step) for step in range(1, 100)}) >= SHADES - 2


@pytest.mark.parametrize("blocks", [1, 2, 30, 126])
def test_heat_map_has_a_cell_for_every_matrix(blocks):
    kinds = ["q_proj", "<b>"]
    picture = parsed(heat_map([matrix(b, kind, 0.1 + b) for b in range(blocks) for kind in kinds], kinds))
    cells = [rect for rect in picture.iter("rect") if "cell" in rect.get("class")]
    assert len(cells) == 2 * blocks
    assert max(Counter((cell.get("x"), cell.get("y")) for cell in cells).values()) == 1
    width = float(picture.get("width"))
    assert all(float(cell.get("x")) + float(cell.get("width")) <= width for cell in cells)


def test_nothing_to_draw():
    assert heat_map([], []) is None
    assert heat_map([matrix(None, "x", 0.1), matrix(1, "x", None)], ["x"]) is None
    assert loss_panels([matrix(0, "x", 0.1), matrix(0, "x", 0.1, (1.0,)), matrix(0, "x", 0.1, (0.0, 0.0))], ["x"]) == []
    assert bars([], "none") is None
    assert bars([Bar("x", 0, "0")], "none") is None


def test_curves_stay_inside_whatever_the_solver_did():
    losses = [(1.0, 0.5, 0.1), (1.0, -3.0, 1e30), (0.5, 0.5), tuple(1 / (step + 1) for step in range(5000))]
    ((kind, picture),) = loss_panels([matrix(index, "x", 0.1, curve) for index, curve in enumerate(losses)], ["x"])
    assert kind == "x"
    root = parsed(picture)
    _, _, width, height = map(float, root.get("viewBox").split())
    lines = list(root.iter("polyline"))
    assert len(lines) == 5
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(points) <= 62 or line.get("class") == "median"
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_bars_are_in_proportion():
    root = parsed(bars(share_bars({"<i>": 30.0, "b": 10.0}), "bytes & more"))
    widths = [float(rect.get("width")) for rect in root.iter("rect")]
    assert widths[0] == pytest.approx(3 * widths[1], rel=1e-2)
    assert [text.text for text in root.iter("text")] == ["<i>", "30 bytes, 75.0 %", "b", "10 bytes, 25.0 %"]
