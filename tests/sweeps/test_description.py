"""What a sweep file may say, and what is refused in one line."""

from __future__ import annotations

import re

import pytest
import yaml

from halfplate.errors import HalfplateError
from halfplate.sweeps.description import MOST_ROWS, read_sweep

ROWS = ["original", {"name": "wanda", "method": "wanda"}]


def names(rows, **others):
    return [row.name for row in read_sweep({"model": "m", "rows": rows, **others}).rows]


def test_a_row_lies_over_its_file_and_the_file_over_the_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: armor\nsamples: 8\nmethod_options: {iterations: 5, damping: 0.1}\n")
    base = {"samples": 4, "seed": 3, "method_options": {"iterations": 9}, "activations": "int8"}
    rows = [str(file), {"name": "own", "recipe": str(file), "samples": 16, "method_options": {"damping": 0.2}}]
    rows += [{"name": "other", "method": "wanda", "activations": "float"}]
    mine, own, other = read_sweep({"model": "m", "base": base, "rows": rows}).rows
    assert (mine.name, mine.recipe.samples, mine.recipe.seed, mine.activations) == ("mine", 8, 3, "int8")
    assert dict(mine.recipe.method_options) == {"iterations": 5, "damping": 0.1}
    assert (own.recipe.samples, dict(own.recipe.method_options)) == (16, {"iterations": 5, "damping": 0.2})
    # Options of one method are none of another.
    assert (other.recipe.method_options, other.recipe.samples, other.activations) == ({}, 4, "float")


def test_the_base_may_name_a_recipe_and_a_row_one_that_is_shipped():
    found = read_sweep(
        {"model": "m", "base": {"recipe": "quick-look"}, "rows": [{"name": "a", "samples": 2}, "quick-look"]}
    )
    assert [row.recipe.method for row in found.rows] == [found.rows[1].recipe.method] * 2
    assert [row.recipe.samples for row in found.rows] != [2, 2]
    assert found.rows[0].recipe.samples == 2


def test_lists_make_a_row_of_every_combination():
    row = {"name": "s", "method": "sparsegpt", "samples": [2, 4], "method_options": {"damping": [0.01, 0.1]}}
    found = read_sweep({"model": "m", "rows": [row | {"exclude": ["*.q_proj", "*.k_proj"]}]}).rows
    assert [one.name for one in found] == [f"s, samples {s}, damping {d}" for s in (2, 4) for d in (0.01, 0.1)]
    made = [(one.recipe.samples, one.recipe.method_options["damping"]) for one in found]
    assert made == [(2, 0.01), (2, 0.1), (4, 0.01), (4, 0.1)]
    assert all(one.recipe.exclude == ("*.q_proj", "*.k_proj") for one in found)
    assert names([{"name": "r", "method": "ria", "method_options": {"permute": [True]}, "samples": [2048]}]) == [
        "r, samples 2048, permute true"
    ]
    assert names([{"name": "w", "calibration": ["a/one.txt", "b/two.txt"]}]) == [
        "w, calibration one.txt",
        "w, calibration two.txt",
    ]


def test_evaluation_and_speed_are_typed():
    found = read_sweep({"model": "m", "rows": ROWS, "eval": {"text": "a.txt", "windows": "4"}, "speed": {"prompt": 8}})
    assert (found.evaluation, found.speed) == ({"text": ("a.txt",), "windows": 4}, {"prompt": 8})
    assert read_sweep({"model": "m", "rows": ROWS, "speed": True}).speed == {}
    for nothing in ({}, {"speed": False}, {"speed": None, "eval": None, "base": None}):
        assert read_sweep({"model": "m", "rows": ROWS, **nothing}).speed is None


BAD = [
    ({"modle": "m"}, "key 'modle' is unknown; did you mean 'model'?"),
    ({"model": None}, "model=None is of type NoneType"),
    ({"version": 2}, "version=2 is unknown"),
    ({"rows": {"a": 1}}, "rows is a dict, expected a list"),
    ({"rows": []}, "rows is empty"),
    ({"rows": ["original", "original"]}, "name='original' is given to two rows"),
    ({"rows": [ROWS[1], ROWS[1]]}, "name='wanda' is given to two rows"),
    ({"rows": [3]}, "a row is a int, expected a mapping"),
    ({"rows": [{"method": "wanda"}]}, "has no name"),
    ({"rows": [{"name": 4}]}, "name=4 of a row is a int, expected a text"),
    ({"rows": [{"name": "original", "method": "wanda"}]}, "name='original' is reserved for the original model"),
    ({"rows": [{"name": "a/b"}]}, "name='a/b' of a row has a path separator"),
    ({"rows": [{"name": ".."}]}, "name='..' of a row begins with a dot"),
    ({"rows": [{"name": "a\nb"}]}, "has characters that cannot be printed"),
    ({"rows": [{"name": " "}]}, "name=' ' of a row is empty"),
    ({"rows": [{"name": "é" * 61}]}, "has 122 bytes, expected at most 120"),
    ({"rows": [{"name": "a", "methd": "wanda"}]}, "row 'a': key 'methd' is unknown; did you mean 'method'?"),
    ({"rows": [{"name": "a", "method": "wonda"}]}, "row 'a': method='wonda' is unknown; did you mean 'wanda'?"),
    ({"rows": [{"name": "a", "method_options": {"iteratons": 1}}]}, "row 'a': "),
    ({"rows": [{"name": "a", "samples": []}]}, "row 'a': samples is an empty list"),
    ({"rows": [{"name": "a", "samples": [0, 1]}]}, "row 'a, samples 0': samples=0 is out of range"),
    ({"rows": [{"name": "a", "seed": [*range(40)], "samples": [*range(1, 40)]}]}, "row 'a': its lists make 1,560 rows"),
    ({"rows": [{"name": str(i), "seed": [*range(600)]} for i in range(2)]}, "rows makes 1,200 rows"),
    ({"rows": [{"name": "a", "max_kl": 1.0}]}, "row 'a': max_kl=1.0 is not allowed in a sweep"),
    ({"rows": [{"name": "a", "activations": "int4"}]}, "row 'a': activations='int4' is not one of float, int8"),
    ({"rows": ["nowhere.yaml"]}, "row 'nowhere': recipe='nowhere.yaml' cannot be read"),
    ({"base": {"name": "a"}}, "base: key 'name' is unknown"),
    ({"base": {"samples": [1, 2]}}, "row 'wanda': samples=[1, 2] is not of the right type"),
    ({"base": 3}, "base is a int, expected a mapping"),
    ({"eval": {"window": 3}}, "eval: key 'window' is unknown; did you mean 'windows'?"),
    ({"eval": {"windows": 0}}, "eval: windows=0 is out of range"),
    ({"eval": {"windows": "many"}}, "eval: windows='many' is not of the right type"),
    ({"eval": {"text": []}}, "eval: text is an empty list"),
    ({"speed": 3}, "speed is a int, expected a mapping"),
    ({"speed": {"round": 3}}, "speed: key 'round' is unknown; did you mean 'rounds'?"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_what_cannot_work_is_refused_in_one_line(changes, said):
    with pytest.raises(HalfplateError, match=re.escape(said)) as refused:
        read_sweep({"model": "m", "rows": ROWS} | changes)
    assert "\n" not in str(refused.value)
    assert MOST_ROWS == 1000


def test_files_that_are_no_sweep_are_refused_by_name(tmp_path):
    file = tmp_path / "s.yaml"
    with pytest.raises(HalfplateError, match=r"s\.yaml' cannot be read: No such file"):
        read_sweep(file)
    for content, said in (
        ("rows: [", "is not valid YAML"),
        ("- a", "the sweep is a list"),
        ("model: m", "rows is missing"),
    ):
        file.write_text(content)
        with pytest.raises(HalfplateError, match=rf"sweep='.*s\.yaml'.*{said}"):
            read_sweep(file)
    file.write_text(yaml.safe_dump({"model": "m", "rows": ROWS}))
    assert [row.name for row in read_sweep(str(file)).rows] == ["original", "wanda"]
    with pytest.raises(HalfplateError, match="sweep=3 is of type int"):
        read_sweep(3)
