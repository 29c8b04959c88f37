"""Processes give what one process gives, also when one of them is killed."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfplate.compression import hidden_states as hidden
from halfplate.compression import layers as blocks
from halfplate.compression.compress import compress
from halfplate.engines import local as engines
from halfplate.engines.local import Processes
from halfplate.errors import HalfplateError
from halfplate.recipe import Recipe


class Deadly:
    """A task that ends its process."""

    cost, keeps = 1.0, dict

    def run(self, blocks):
        import os

        os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["compressed", "dense"])
def test_two_workers_give_the_bytes_of_one_though_a_worker_is_killed(tiny_folder, tmp_path, monkeypatch, inputs):
    monkeypatch.setattr(hidden, "CHUNKS", 2)  # of 5 batches, so that chunks hold several
    monkeypatch.setattr(blocks, "AHEAD", 10)
    recipe = Recipe(method="sparsegpt", inputs=inputs, samples=36, seq_len=16, threads=1)
    compress(str(tiny_folder), tmp_path / "one", recipe)
    killed, order = [], []

    def report(phase, done, total, *more, **named):
        if phase == "compressing" and done >= 4 and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    for name in ("begin", "finish"):
        original = getattr(blocks._Loop, name)
        told = lambda *args, name=name, original=original: (order.append(name), original(*args))[1]  # noqa: E731
        monkeypatch.setattr(blocks._Loop, name, told)
    compress(str(tiny_folder), tmp_path / "two", recipe, workers=2, report=report)
    assert killed
    # With dense inputs nothing of a block waits for the matrices of the one before.
    assert order == (["begin", "finish"] * 2 if inputs == "compressed" else ["begin"] * 2 + ["finish"] * 2)
    for file in ("model.safetensors", "halfplate.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not multiprocessing.active_children()


# In a file of its own, where other processes find it.
DEADLY_ONCE = """
import os

class DeadlyOnce:
    cost, keeps = 1.0, dict

    def __init__(self, mark):
        self.mark = mark

    def run(self, blocks):
        if not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return self.mark.name
"""


@pytest.mark.slow
def test_runs_under_way_at_once_outlive_a_process(tmp_path, monkeypatch):
    (tmp_path / "deadly_once.py").write_text(DEADLY_ONCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engines, "TRIES", 10)  # each task kills a process
    from deadly_once import DeadlyOnce

    engine = Processes(2)
    try:
        runs = [engine.run([DeadlyOnce(tmp_path / f"{run}-{task}") for task in range(2)]) for run in range(2)]
        assert [list(run) for run in reversed(runs)] == [["1-0", "1-1"], ["0-0", "0-1"]]
    finally:
        engine.close()


@pytest.mark.slow
def test_a_task_that_always_kills_its_process_is_given_up(monkeypatch):
    assert engines.TRIES == 3
    monkeypatch.setattr(engines, "TRIES", 2)  # each takes seconds
    engine = Processes(1)
    try:
        with pytest.raises(HalfplateError, match="a worker process died 2 times"):
            list(engine.run([Deadly()]))
    finally:
        engine.close()


INTERRUPTED = """
import os, signal, time

class Interrupted:
    cost, keeps = 1.0, dict

    def run(self, blocks):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""


def test_ctrl_c_ends_a_worker_without_a_word(tmp_path, monkeypatch, capfd):
    """A terminal sends it to every process, and the command says what there is to say."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engines, "TRIES", 1)
    from interrupted import Interrupted

    engine = Processes(1)
    try:
        with pytest.raises(HalfplateError, match="died"):
            list(engine.run([Interrupted()]))
    finally:
        engine.close()
    assert capfd.readouterr().err == ""


SURVIVORS = """
import os, signal
from halfplate.engines.local import Processes

class Named:
    cost, keeps = 1.0, dict
    def run(self, blocks):
        return os.getpid()

if __name__ == "__main__":
    (worker,) = Processes(1).run([Named()])
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_where_their_parent_is_killed(tmp_path):
    script = tmp_path / "survivors.py"
    script.write_text(SURVIVORS)
    run = subprocess.run(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    worker = Path("/proc") / run.stdout.strip()
    end = time.monotonic() + 60
    while worker.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert run.stdout.strip()
    assert not worker.exists()
