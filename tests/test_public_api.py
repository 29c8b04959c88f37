"""The public names: documented, listed, typed, and quick to import; their examples and the tutorial run."""

import doctest
import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import halfplate
from halfplate.cli import build_parser
from halfplate.errors import HalfplateError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()
NAMES = [name for name in halfplate.__all__ if name != "__version__"]


@pytest.fixture
def workplace(tiny_folder, tmp_path, monkeypatch):
    """A folder with the tiny model under the names that documents use."""
    for name in ("tiny", "SmolLM2"):
        (tmp_path / name).symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)


def test_every_public_name_is_listed_and_nothing_else():
    assert sorted(set(re.findall(r"`halfplate\.(\w+)[(`]", PAGE))) == sorted(halfplate.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring_and_types(name):
    found = getattr(halfplate, name)
    assert inspect.getdoc(found)
    if inspect.isfunction(found):
        hints = inspect.signature(found)
        assert hints.return_annotation is not inspect.Signature.empty
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in hints.parameters.values())


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(halfplate, name))])
def test_the_page_shows_arguments_and_defaults_that_are_there(name):
    (shown,) = re.findall(rf"`halfplate\.{name}\((.*?)\)`", PAGE)
    parameters = inspect.signature(getattr(halfplate, name)).parameters
    for argument in (part for part in shown.split(", ") if part != "…"):
        argument, _, default = argument.lstrip("*").partition("=")
        assert argument in parameters
        if default not in ("", "…") and "torch" not in default:
            assert repr(parameters[argument].default) == default.replace('"', "'")


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(halfplate, name))])
def test_public_classes_their_members_and_fields_are_documented(name):
    """What a class defines itself has a docstring; that of a configuration names every field."""
    found = getattr(halfplate, name)
    for member, value in vars(found).items():
        if not member.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
            assert inspect.getdoc(getattr(found, member)), f"{name}.{member}"
    if is_dataclass(found) and "__dataclass_fields__" in vars(found):
        assert [part.name for part in fields(found) if not re.search(rf"\b{part.name}\b", found.__doc__ or "")] == []


def test_arguments_of_verbs_are_options_of_the_command_line():
    (actions,) = (action.choices for action in build_parser()._actions if action.dest == "verb")
    for verb, name in {"eval": "evaluate", "bench": "bench"}.items():
        known = {action.dest for action in actions[verb]._actions}
        mirrored = set(inspect.signature(getattr(halfplate, name)).parameters) - {"report", "progress"}
        assert mirrored <= known, mirrored - known


def test_unknown_options_are_named():
    with pytest.raises(HalfplateError, match="option='blocksize' is unknown; did you mean 'block_size'"):
        halfplate.plan("x", blocksize=3)
    with pytest.raises(HalfplateError, match="option='token' is unknown; did you mean 'tokens'"):
        halfplate.recover("x", "y", "z", token=3)


@pytest.mark.parametrize("value", [None, 3, b"x", ["a"]])
def test_what_is_no_path_is_named(value, tmp_path):
    for call, name in (
        (lambda: halfplate.plan(value), "model"),
        (lambda: halfplate.compress(value, tmp_path / "out"), "model"),
        (lambda: halfplate.compress("tiny", value), "out"),
        (lambda: halfplate.load(value), "path"),
        (lambda: halfplate.evaluate(value), "model"),
        (lambda: halfplate.bench(value), "model"),
        (lambda: halfplate.export(value, tmp_path / "out"), "path"),
        (lambda: halfplate.recover("tiny", value, tmp_path / "out", tokens=10), "teacher"),
    ):
        with pytest.raises(halfplate.HalfplateError, match=f"^{name}=.*expected a path or a name"):
            call()
    with pytest.raises(halfplate.HalfplateError, match="expected a Recovery"):
        halfplate.recover("tiny", "tiny", "out", value or "x", tokens=10)


def test_a_model_may_be_a_path(tiny_folder):
    plans = [halfplate.plan(model, samples=4, seq_len=32) for model in (tiny_folder, str(tiny_folder))]
    assert plans[0].fingerprint == plans[1].fingerprint


def test_importing_halfplate_imports_nothing_heavy():
    code = "import sys, halfplate; assert not {'torch', 'transformers', 'numpy', 'rich', 'yaml'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_examples_in_docstrings_run(workplace):
    finder = doctest.DocTestFinder()
    found = [finder.find(function, globs={"halfplate": halfplate}) for function in (halfplate.plan, halfplate.compress)]
    tests = [test for several in found for test in several if test.examples]
    assert len(tests) == 2
    for test in tests:
        runner = doctest.DocTestRunner()
        runner.run(test)
        assert runner.failures == 0


@pytest.mark.slow
def test_the_tutorial_runs(workplace, capsys):
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    session: dict[str, object] = {}
    for cell in cells:
        exec(cell, session)
    printed = capsys.readouterr().out
    assert "14 matrices" in printed
    assert "times the original" in printed
    assert Path("plain", "model.safetensors").exists()
