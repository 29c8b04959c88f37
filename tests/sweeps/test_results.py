"""The table of a sweep, from its JSON object alone."""

from __future__ import annotations

from halfplate.sweeps.results import markdown, table

SIZES = {"weight_nbytes": 2_500_000, "share": 0.25, "linear_share": 0.2}
MADE = {"compression": {"seconds": {"total": 12.34}, "continued": False}}


def row(name, **parts):
    return {"name": name, "status": "done", "why": "", **SIZES, **parts}


def test_tasks_have_a_column_of_their_better_known_score():
    tasks = {"piqa": {"acc": 0.5}, "hellaswag": {"acc": 0.3, "acc_norm": 0.4}}
    columns, rows = table(
        {"rows": [row("original", evaluation={"tasks": tasks}), row("a", evaluation={"tasks": tasks}, **MADE)]}
    )
    assert columns[4:] == ["piqa: acc", "hellaswag: acc norm", "compression, s"]
    assert rows == [["original", 2.5, 0.25, 0.2, 0.5, 0.4, None], ["a", 2.5, 0.25, 0.2, 0.5, 0.4, 12.3]]


def test_rows_without_figures_have_dashes_and_a_line():
    failed = {"name": "a|b", "status": "failed", "why": "no\nluck"}
    left = {"name": "c", "status": "to do", "why": "not measured yet"}
    lines = markdown({"rows": [row("o", evaluation={"perplexity": 2.0}), failed, left]}).splitlines()
    assert lines[2] == "| o | 2.5 | 0.25 | 0.2 | 2 | - | - | - |"
    assert lines[3] == "| a\\|b | - | - | - | - | - | - | - |"
    assert lines[5:] == ["", "- a\\|b: failed, no luck", "- 1 of 3 rows are not measured yet"]


def test_a_sweep_of_nothing_done_has_a_table():
    columns, rows = table({"rows": [{"name": "a", "status": "to do", "why": "x"}]})
    assert columns == ["row", "weights, MB", "of original", "linears, of original", "compression, s"]
    assert rows == [["a", None, None, None, None]]


def test_a_loss_beyond_all_numbers_is_a_dash():
    (line,) = markdown({"rows": [row("a", evaluation={"perplexity": None, "kl": None}, **MADE)]}).splitlines()[2:]
    assert line == "| a | 2.5 | 0.25 | 0.2 | - | - | - | 12.3 |"
