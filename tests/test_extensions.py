"""Extensions that live outside the package: the examples as installed, and plugins that clash or are broken."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfplate.calibration import read_text
from halfplate.calibration.documents import SOURCES
from halfplate.cli import main
from halfplate.compression.result import identity_of
from halfplate.compression.work_folder import check_same
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.methods import METHODS, create
from halfplate.models.sources import open_source
from halfplate.pattern import DENSE, Pattern
from halfplate.planning import make_plan
from halfplate.recipe import Recipe
from halfplate.registry import installed
from halfplate.statistics import InputStatistics

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "extensions"
PAGE = (ROOT / "docs" / "extending.md").read_text()
QUICK = ["--samples", "4", "--seq-len", "32", "--threads", "1"]


def _problem(d_out=12, d_in=40):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator)
    inputs = torch.randn(200, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    gram = inputs.T.double() @ inputs.double() / 200
    return weight, InputStatistics(200, gram.diagonal().float(), gram)


def _error(weight, solution, statistics):
    difference = (weight - solution.weight.dense()).double()
    return float((difference @ statistics.gram * difference).sum())


def test_the_page_shows_the_entry_points_of_the_example():
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert block in (EXAMPLES / "pyproject.toml").read_text()


def test_examples_are_short():
    for file in (EXAMPLES / "halfplate_extensions").glob("*.py"):
        assert len(file.read_text().splitlines()) < 60, file.name


def test_scaled_rows_lose_less_than_wanda_and_each_scale_is_the_best(examples):
    weight, statistics = _problem()
    spec = WeightSpec(*weight.shape, Pattern(2, 4), "fp32")
    plain = create("wanda").compress(weight, statistics, spec)
    scaled = create("wanda-scaled").compress(weight, statistics, spec)
    assert _error(weight, scaled, statistics) < _error(weight, plain, statistics)
    kept, gram = plain.weight.dense().double(), statistics.gram
    for row, found, whole in zip(kept, scaled.weight.dense().double(), weight.double(), strict=True):
        best = float(whole @ gram @ row / (row @ gram @ row))
        torch.testing.assert_close(found, row * min(max(best, 0.5), 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d_in", [40, 128, 300])
def test_ternary_weights_are_those_of_the_loops(examples, d_in):
    weight = _problem(d_in=d_in)[0]
    spec = WeightSpec(*weight.shape, DENSE, "int2")
    found = create("ternary").compress(weight, InputStatistics(), spec).weight.dense()
    for row in range(weight.shape[0]):
        for first in range(0, d_in, 128):
            group = weight[row, first : first + 128].tolist()
            threshold = 0.7 * sum(map(abs, group)) / len(group)
            large = [abs(w) for w in group if abs(w) > threshold]
            scale = float(torch.tensor(sum(large) / len(large)).half())
            expected = [0.0 if abs(w) <= threshold else scale * (1 if w > 0 else -1) for w in group]
            torch.testing.assert_close(found[row, first : first + 128], torch.tensor(expected), rtol=1e-3, atol=1e-6)


def test_bad_values_of_the_examples_are_one_line(examples, tmp_path, tiny_folder):
    with pytest.raises(HalfplateError, match=r"limit=0.0 must be"):
        create("wanda-scaled", limit=0.0)
    with pytest.raises(HalfplateError, match="core_dtype='bf16'"):
        make_plan(str(tiny_folder), Recipe(method="ternary"))
    with pytest.raises(HalfplateError, match="is not a folder"):
        read_text(f"folder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HalfplateError, match="holds no"):
        read_text(f"folder:{tmp_path / 'empty'}")


@pytest.mark.slow
def test_commands_of_the_page_run_with_the_package_installed(tiny_folder, tmp_path):
    """In a process of its own, on the package as pip installs it."""
    site = tmp_path / "site"
    source = tmp_path / "extensions"
    shutil.copytree(EXAMPLES, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", site, source]
    subprocess.run(pip, check=True, capture_output=True)
    shutil.copytree(tiny_folder, tmp_path / "SmolLM2")
    (tmp_path / "texts").mkdir()
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path / "texts" / "page.md")
    lines = [shlex.split(line)[1:] for line in re.findall(r"^\$ (halfplate .*)$", PAGE, re.MULTILINE)]
    assert len(lines) == 7
    more = {"compress": QUICK, "methods": ["--json"], "export": []}
    words = [line + more[line[0]] for line in lines]
    words += [["inspect", "SmolLM2-ternary", "--verify", "--json"], ["generate", "SmolLM2-ternary", "The bird"]]
    code = f"from halfplate.cli import main\nfor words in {words!r}:\n    assert main(words) == 0, words"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{site}"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    listed, _ = json.JSONDecoder().raw_decode(run.stdout)
    assert {"wanda-scaled", "ternary", "armor"} <= {method["name"] for method in listed["methods"]}
    record = json.loads((tmp_path / "SmolLM2-by-docs" / "halfplate.json").read_text())
    assert record["calibration"]["source"] == "folder:texts"


def test_nothing_of_a_plugin_is_imported_before_it_is_asked_for(install):
    install("lazy", points=[(METHODS.group, "lazy = lazy_module:Lazy")], lazy_module="raise SystemExit('imported')")
    assert "lazy" in METHODS.names()
    assert METHODS.get("wanda").name == "wanda"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
        ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("", "cannot be imported (AttributeError"),
        ("class Plugin: pass", "is not a dataclass derived from halfplate.methods.Method"),
        ("from halfplate.methods.wanda import Wanda as Plugin", "calls itself 'wanda'"),
        (
            "from halfplate.methods import Method\nclass Plugin(Method):\n    name = 'broken'",
            "lacks compress, requires, summary",
        ),
    ],
)
def test_a_broken_method_is_one_line(install, capsys, tiny_folder, code, reason):
    install("bad", "0.3", [(METHODS.group, "broken = bad_module:Plugin")], bad_module=code)
    assert main(["plan", str(tiny_folder), "--method", "broken"]) == 2
    error, docs = capsys.readouterr().err.splitlines()
    assert error.startswith("halfplate: error: method='broken' of bad 0.3 " + reason)
    assert error.endswith("update or uninstall that package")
    assert docs == "see docs/extending.md"
    assert main(["methods", "--json"]) == 0
    shown = capsys.readouterr()
    assert "warning: method='broken' of bad 0.3" in shown.err
    assert "broken" not in shown.out
    assert "armor" in shown.out


def test_a_name_that_is_taken_is_refused_and_no_other(install):
    install("one", points=[(METHODS.group, "wanda = m:W"), (METHODS.group, "twice = m:W")])
    install("two", "2.0", [(METHODS.group, "twice = m:W"), (SOURCES.group, "self = m:read")])
    for name, claims in {"wanda": "halfplate itself and by one 1.0", "twice": "one 1.0 and by two 2.0"}.items():
        with pytest.raises(HalfplateError, match=f"method='{name}' is claimed by {claims}; uninstall one of them"):
            METHODS.get(name)
    with pytest.raises(HalfplateError, match=r"calibration='self' is claimed by halfplate itself and by two 2\.0"):
        read_text("self")
    assert METHODS.get("armor").name == "armor"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def read(what): return open('/nowhere')", "failed on 'own:x' (FileNotFoundError"),
        ("def read(what): yield 3", "gave a int as document 1, expected a str"),
        ("read = 7", "failed on 'own:x' (TypeError"),
    ],
)
def test_a_broken_calibration_source_is_one_line(install, code, reason):
    install("text", "5.1", [(SOURCES.group, "own = text_module:read")], text_module=code)
    with pytest.raises(HalfplateError, match=re.escape(f"calibration='own' of text 5.1 {reason}")):
        read_text("own:x")


def test_half_a_surrogate_pair_of_a_plugin_is_no_text(install):
    install(
        "text",
        points=[(SOURCES.group, "own = text_module:read")],
        text_module="def read(what): return ['\\ud800']",
    )
    with pytest.raises(HalfplateError, match=r"calibration='own', document 1 .* not valid Unicode"):
        read_text("own")


def test_another_version_of_a_plugin_is_another_plan(install, examples, tiny_folder, tmp_path):
    recipe = Recipe(method="wanda-scaled", seq_len=32)
    plan = make_plan(str(tiny_folder), recipe)
    first, begun = plan.fingerprint, identity_of(open_source(str(tiny_folder)), plan, 1)
    info = tmp_path / "site" / "halfplate-extensions-1.0.dist-info" / "METADATA"
    info.write_text(info.read_text().replace("Version: 1.0", "Version: 1.1"))
    installed.cache_clear()
    plan = make_plan(str(tiny_folder), recipe)
    assert plan.fingerprint != first
    now = identity_of(open_source(str(tiny_folder)), plan, 1)
    with pytest.raises(HalfplateError, match=r"plugins was .*1\.0'} when it began and is .*1\.1'} now"):
        check_same({"plugins": begun["plugins"]}, {"plugins": now["plugins"]}, "it began")
