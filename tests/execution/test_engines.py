"""Processes give what one process gives, also when one of them is killed."""

import multiprocessing

import pytest

from halfplate.errors import HalfplateError
from halfplate.execution.engines import TRIES, Processes
from halfplate.execution.local import compress
from halfplate.recipe import Recipe


class Deadly:
    """A task that ends its process."""

    cost = 1.0

    def run(self, blocks):
        import os

        os._exit(1)


def test_two_workers_give_the_bytes_of_one_though_a_worker_is_killed(tiny_folder, tmp_path):
    recipe = Recipe(method="sparsegpt", samples=12, seq_len=16, threads=1)
    compress(str(tiny_folder), tmp_path / "one", recipe)
    killed = []

    def report(phase, done, total, *more, **named):
        if phase == "compressing" and done >= 4 and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    compress(str(tiny_folder), tmp_path / "two", recipe, workers=2, report=report)
    assert killed
    for file in ("model.safetensors", "halfplate.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not multiprocessing.active_children()


def test_a_task_that_always_kills_its_process_is_given_up():
    engine = Processes(1)
    try:
        with pytest.raises(HalfplateError, match=f"a worker process died {TRIES} times"):
            engine.run([Deadly()])
    finally:
        engine.close()
