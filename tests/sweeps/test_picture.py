"""The picture of a sweep."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from halfplate.sweeps.picture import Axis, Point, front, picture

SVG = "{http://www.w3.org/2000/svg}"


def result(*rows):
    return {"model": "models/tiny", "rows": list(rows)}


def row(name, nbytes, **evaluation):
    return {"name": name, "status": "done", "compression": {}, "weight_nbytes": nbytes, "evaluation": evaluation}


def circles_of(drawn):
    """The circle of each row, by its name."""
    return {circle[0].text.partition(":")[0]: circle for circle in drawn.iter(f"{SVG}circle")}


def test_the_front_holds_what_nothing_beats():
    points = [Point(str(kl), nbytes, kl) for nbytes, kl in ((1, 0.9), (2, 0.5), (3, 0.7), (4, 0.1), (2, 0.8))]
    assert [point.loss for point in front(points)] == [0.9, 0.5, 0.1]


def test_every_row_is_drawn_and_the_best_are_filled():
    original = {"name": "original", "status": "done", "weight_nbytes": 9, "evaluation": {"perplexity": 3.0}}
    failed = {"name": "failed", "status": "failed", "why": "x"}
    rows = [row("small", 10**6, kl=2.0), row("worse", 2 * 10**6, kl=3.0), row("<big>", 3 * 10**6, kl=0.01)]
    drawn = ElementTree.fromstring(picture(result(original, failed, *rows)))
    circles = circles_of(drawn)
    assert {name: circle.get("class") for name, circle in circles.items()} == {
        "small": "best",
        "worse": "other",
        "<big>": "best",
    }
    assert float(circles["small"].get("cx")) < float(circles["worse"].get("cx")) < float(circles["<big>"].get("cx"))
    assert float(circles["<big>"].get("cy")) > float(circles["small"].get("cy")) > float(circles["worse"].get("cy"))
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"small", "worse", "<big>"} <= set(texts)
    assert "tiny: KL to the original, nats per token, against the bytes of all weights" in texts


def test_against_speed_more_is_better():
    rows = [row("slow", 1, kl=0.1), row("worse", 1, kl=0.5), row("fast", 1, kl=0.4), row("not timed", 1, kl=0.01)]
    for one, speed in zip(rows, (0.9, 1.0, 2.5), strict=False):
        one["speed"] = {"decode_speedup": speed}
    drawn = ElementTree.fromstring(picture(result(*rows), against="speed"))
    circles = circles_of(drawn)
    assert {name: circle.get("class") for name, circle in circles.items()} == {
        "slow": "best",
        "worse": "other",
        "fast": "best",
    }
    assert float(circles["slow"].get("cx")) < float(circles["worse"].get("cx")) < float(circles["fast"].get("cx"))
    assert picture(result(row("not timed", 1, kl=0.01)), against="speed") is None


def test_without_kl_the_loss_is_perplexity_and_without_either_there_is_no_picture():
    assert "perplexity" in picture(result(row("a", 1, perplexity=3.0)))
    assert picture(result(row("a", 1, tasks={}))) is None
    assert picture(result(row("a", 1, kl=float("inf")), row("b", 1, kl=None))) is None
    assert picture(result()) is None


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1e-6, 3.0], [0.3, 0.4], [1e9, 1e9 + 1], [0.0, 5.0]])
def test_axes_show_their_values(values):
    axis = Axis.of(values, 500, 20, may_be_logarithmic=True)
    assert all(20 <= axis.at(value) <= 500 for value in values)
    assert 1 <= len(axis.ticks()) <= 12
