import io

import pytest

from halfplate.cli import console
from halfplate.telemetry.progress import TimeLeft, silent, together


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_time_left_is_exact_where_the_shares_are():
    clock = Clock()
    left = TimeLeft(clock)
    costs = [5.0, 1.0, 1.0, 20.0, 3.0]
    assert left("solving", 0, len(costs), 0.0) is None
    for step in range(1, len(costs) + 1):
        clock.now += costs[step - 1]
        share = sum(costs[:step]) / sum(costs)
        assert left("solving", step, len(costs), share) == pytest.approx(sum(costs[step:]), abs=1e-9)
        assert left.spent == pytest.approx(sum(costs[:step]))


def test_time_left_counts_steps_where_nothing_else_is_known():
    clock = Clock()
    left = TimeLeft(clock)
    assert left("reading", 0, 4) is None
    clock.now += 2
    assert left("reading", 1, 4) == pytest.approx(6)
    clock.now += 2
    assert left("writing", 0, 1) is None
    assert left.spent == 0


def test_what_an_earlier_run_finished_takes_no_time_now():
    """A run resumed at three quarters of the work has one quarter to time."""
    clock = Clock()
    left = TimeLeft(clock)
    assert left("solving", 75, 100, 0.75) is None
    clock.now += 10
    assert left("solving", 80, 100, 0.80) == pytest.approx(40)


def test_blocks_of_equal_cost_are_foretold_after_the_first():
    """Matrices of a block cost what they like: over whole blocks their share of the weights is that of the time."""
    clock = Clock()
    left = TimeLeft(clock)
    blocks, weights, seconds = 30, [1, 1, 1, 1, 3, 3, 3], [0.2, 0.1, 0.1, 0.2, 2.0, 2.0, 9.0]
    left("compressing", 0, blocks * len(weights), 0.0)
    done = 0
    for block in range(blocks):
        for weight, cost in zip(weights, seconds, strict=True):
            done += weight
            clock.now += cost
            told = left("compressing", 1, 2, done / (blocks * sum(weights)))
            truly = blocks * sum(seconds) - (clock.now - 100)
            if 0 < block < blocks - 2:
                assert truly / 1.5 < told < truly * 1.5


def test_all_reports_are_told():
    told = []
    report = together(silent, lambda *step: told.append(step), lambda *step: told.append(step))
    report("reading", 1, 2, "half", share=0.5, facts={"event": "x"})
    assert told == [("reading", 1, 2, "half", 0.5, {"event": "x"})] * 2


def test_a_listener_that_has_gone_stops_no_run(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stderr", Gone())
    for report in (console._Lines(), console._Lines(every_step=True)):
        report("reading", 0, 1)
        report("reading", 1, 1, facts={"event": "end"})


def test_the_bar_of_a_phase_that_begins_again_counts_anew():
    with console._bars() as bars:
        report = console._Bars(bars)
        for done in (0, 1, 2):
            report("solving", done, 2)
        (task,) = bars.tasks
        assert task.finished
        report("solving", 0, 2)
        assert (task.completed, task.finished) == (0, False)
        started = task.start_time
        # A step that is still the first does not.
        report("solving", 0, 2, share=0.1)
        assert task.start_time == started
