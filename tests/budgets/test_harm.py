"""The harm of matrices that is not measured, between those where it is."""

import math

import pytest

from halfplate.budgets.measure import Unit, _interpolated


def test_harm_is_interpolated_between_layers_with_the_same_matrices():
    names = [f"layers.{block}.{kind}" for block in range(5) for kind in ("up", "down")]
    blocks = {name: int(name.split(".")[1]) for name in names}
    known = {"layers.0.up": 1.0, "layers.4.up": 16.0, "layers.1.down": 3.0}
    units = [Unit((name,), (), known.get(name, math.nan)) for name in names]
    found = {unit.names[0]: unit.harm for unit in _interpolated(units, blocks)}
    assert [found[f"layers.{block}.up"] for block in range(5)] == pytest.approx([1, 2, 4, 8, 16])
    assert [found[f"layers.{block}.down"] for block in range(5)] == pytest.approx([3] * 5)


def test_a_matrix_that_loses_nothing_keeps_its_harm_of_zero():
    units = [Unit(("layers.0.up",), (), 0.0), Unit(("layers.1.up",), (), math.nan)]
    assert [unit.harm for unit in _interpolated(units, {"layers.0.up": 0, "layers.1.up": 1})] == [0.0, 0.0]
