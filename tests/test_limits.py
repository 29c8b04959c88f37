"""Threads and workers are bounded by what the machine has, in words that name the argument, the value and the machine."""

import pytest
import torch

import halfplate
from halfplate import limits
from halfplate.cli import main
from halfplate.compression import compress as local
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.evaluation.bench import bench
from halfplate.evaluation.judge import evaluate
from halfplate.recipe import Recipe
from halfplate.storage.artifact import read_json, write_json

TOO_MANY = "100000"
QUICK = ["--method", "magnitude", "--no-benchmark"]


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "MODEL", *QUICK, "--threads", TOO_MANY],
        ["plan", "MODEL", *QUICK, "--workers", TOO_MANY],
        ["compress", "MODEL", "-o", "OUT", *QUICK, "--threads", TOO_MANY],
        ["compress", "MODEL", "-o", "OUT", *QUICK, "--workers", TOO_MANY],
        ["eval", "MODEL", "--threads", TOO_MANY],
        ["bench", "MODEL", "--threads", TOO_MANY],
        ["generate", "MODEL", "One day", "--threads", TOO_MANY],
        ["report", "MODEL", "--threads", TOO_MANY],
        ["recover", "MODEL", "--teacher", "MODEL", "-o", "OUT", "--tokens", "64", "--threads", TOO_MANY],
    ],
    ids=lambda command: f"{command[0]} {command[-2]}",
)
def test_every_verb_refuses_more_than_the_machine_has(command, tiny_folder, tmp_path, capsys):
    places = {"MODEL": str(tiny_folder), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in command]) == 2
    argument = command[-2].removeprefix("--")
    cores = limits.cores()
    assert f"{argument}=100000 is more than the {cores} cores that this process may use" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_interface_of_python_refuses_them_too(tiny_folder, tmp_path):
    model = str(tiny_folder)
    for call in (
        lambda: halfplate.compress(model, tmp_path / "out", method="magnitude", threads=100_000),
        lambda: halfplate.compress(model, tmp_path / "out", method="magnitude", workers=100_000),
        lambda: halfplate.plan(model, method="magnitude", threads=100_000),
        lambda: halfplate.plan(model, method="magnitude", workers=100_000),
        lambda: evaluate(model, threads=100_000),
        lambda: bench(model, threads=100_000),
    ):
        with pytest.raises(HalfplateError, match=r"(threads|workers)=100000 is more than the \d+ cores"):
            call()


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "two"])
def test_what_is_no_number_of_threads_is_refused(value):
    with pytest.raises(HalfplateError, match=r"threads=.* must be a whole number of at least 1"):
        limits.check_threads(value)


def test_variables_of_openmp_are_bounded_and_that_is_said(monkeypatch):
    monkeypatch.setattr(limits, "cores", lambda: 4)
    environment = {"OMP_NUM_THREADS": "100000", "MKL_NUM_THREADS": "4,2", "PATH": "99"}
    told = limits.bound_environment(environment)
    assert told == ["OMP_NUM_THREADS=100000 is more than the 4 cores that this process may use; 4 are used"]
    assert environment == {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4,2", "PATH": "99"}
    assert limits.bound_environment({"OMP_NUM_THREADS": "many"}) == []


def test_threads_that_the_process_has_are_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr("halfplate.compression.preparation.cores", lambda: 1)
    torch.set_num_threads(3)
    assert local.fixed_threads(Recipe(), WorkFolder(tmp_path / "out"), resume=False) == 1


@pytest.fixture
def broken_off(tiny_folder, tmp_path, monkeypatch):
    """The place of a run that began with 2 threads and was broken off."""
    out = tmp_path / "out"
    monkeypatch.setattr(local, "assemble_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(limits, "cores", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        local.compress(str(tiny_folder), out, Recipe(method="magnitude", threads=2))
    monkeypatch.undo()
    return out


@pytest.mark.slow
def test_a_run_goes_on_where_there_are_fewer_cores(tiny_folder, broken_off, monkeypatch):
    for module in (limits, local):
        monkeypatch.setattr(module, "cores", lambda: 1)
    notes = []
    local.compress(
        str(tiny_folder),
        broken_off,
        Recipe(method="magnitude"),
        resume=True,
        report=lambda phase, done, total, note="", share=None, facts=None: notes.append((phase, note)),
    )
    assert (
        "threads",
        "2 as at the start of the run; this machine has 1 cores, so it is slower (the bytes stay the same)",
    ) in notes
    assert (broken_off / "config.json").is_file()


def test_a_run_of_far_too_many_threads_does_not_go_on(tiny_folder, broken_off):
    identity = next(path for path in WorkFolder(broken_off).path.rglob("*.json") if '"threads"' in path.read_text())
    write_json(identity, read_json(identity) | {"threads": 100_000})
    with pytest.raises(HalfplateError, match=r"--resume: the run was begun with threads=100000.*has \d+ cores"):
        local.compress(str(tiny_folder), broken_off, Recipe(method="magnitude"), resume=True)
