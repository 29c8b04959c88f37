import subprocess
import sys

import pytest
import torch

VERBS = [
    "plan",
    "compress",
    "eval",
    "bench",
    "sweep",
    "generate",
    "chat",
    "inspect",
    "export",
    "recipe",
    "methods",
    "doctor",
    "completion",
]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["eval", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from halfplate.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {{"torch", "transformers", "numpy", "rich", "yaml"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version_names_the_instruction_set(capsys, monkeypatch):
    from halfplate import __version__
    from halfplate.cli import main
    from halfplate.kernels import native

    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        assert stop.value.code == 0
        expected = native.isa() if native.available() else native.reason()
        assert capsys.readouterr().out == f"halfplate {__version__}, native kernels: {expected}\n"
        monkeypatch.setenv("HALFPLATE_NATIVE", "0")
        native._open.cache_clear()
    native._open.cache_clear()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    from halfplate.cli import main

    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert verb in capsys.readouterr().out


def test_bad_usage_is_one_line(halfplate, tmp_path):
    halfplate("compres", "x").refused("invalid choice: 'compres'", "compress")
    halfplate().refused("VERB")
    halfplate("compress", "x").refused("-o/--out", "halfplate compress --help")
    halfplate("compress", "x", "-o", tmp_path / "out", "--sample", "3").refused("--sample")
    halfplate("eval", "x", "--windows", "0").refused("--windows", "at least 1")
    halfplate("eval", "x", "--windows", "many").refused("--windows", "whole number", "many")
    halfplate("eval", "x", "--seq-len", "1").refused("--seq-len 1")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--engine", "dask"], ["engine='dask' is unknown", "available: local, ray"]),
        (["--workers", "0"], ["--workers", "at least 1"]),
        (["--address", "x:1"], ["address='x:1'", "engine='local' does not use one", "--engine ray"]),
        (["--inputs", "compresed"], ["inputs='compresed'", "dense, compressed"]),
        (["--core-dtype", "int7"], ["core_dtype='int7'", "int4"]),
        (["--wrapper-dtype", "int4"], ["wrapper_dtype='int4'", "int8"]),
        (["--pattern", "dense"], ["pattern='dense'", "2:4", "rtn"]),
    ],
)
def test_options_that_cannot_be_say_so(halfplate, tiny_folder, tmp_path, options, parts):
    out = tmp_path / "out"
    halfplate("compress", tiny_folder, "-o", out, "--method", "magnitude", *options).refused(*parts)
    assert not out.exists()


def test_int8_activations_are_for_checkpoints(halfplate, tiny_folder):
    for verb in (("eval", tiny_folder), ("generate", tiny_folder, "x")):
        halfplate(*verb, "--activations", "int8").refused("activations='int8'", "not one; leave it out")


def test_engine_local_is_taken(halfplate, tiny_folder):
    assert halfplate("plan", tiny_folder, "--method", "magnitude", "--engine", "local").status == 0


def test_a_bug_shows_its_traceback(halfplate, monkeypatch):
    from halfplate.cli import recipe

    def broken(args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(recipe, "run", broken)
    outcome = halfplate("recipe", "show", "default")
    assert outcome.status == 1
    assert "Traceback" in outcome.err


@pytest.mark.parametrize("verb", ["plan", "compress"])
def test_memory_that_runs_out_is_one_line(halfplate, tiny_folder, tmp_path, monkeypatch, verb):
    def asks_for_too_much(*arguments, **named):
        torch.empty(2**50, dtype=torch.int8).fill_(1)

    place = {"plan": "halfplate.verbs.make_plan", "compress": "halfplate.compression.compress.compress"}
    monkeypatch.setattr(place[verb], asks_for_too_much)
    outcome = halfplate(verb, tiny_folder, *(("-o", tmp_path / "out") if verb == "compress" else ()))
    outcome.refused("out of memory", "docs/troubleshooting.md", status=1)
    assert ("with --resume to continue" in outcome.err) == (verb == "compress")


def test_python_m_halfplate():
    done = subprocess.run([sys.executable, "-m", "halfplate", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
