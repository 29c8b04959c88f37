"""The commands and the Python code of the README run as written, on a tiny model under the names they use."""

import contextlib
import doctest
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from causal_models import MOE
from conftest import build_model
from halfplate.cli import main
from halfplate.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
QUICK = ["--samples", "4", "--seq-len", "32"]
FEW = ["--option", "iterations=2"]  # of ARMOR
# What makes other commands quick.
LESS = {
    "prune": QUICK,
    "recover": ["--tokens", "4096", "--samples", "64", "--seq-len", "32"],
    "eval": ["--windows", "2", "--seq-len", "32"],
    "bench": ["--prompt", "4", "--new-tokens", "2", "--rounds", "1"],
}


@pytest.fixture
def workplace(tiny_folder, tmp_path, monkeypatch):
    """A folder with the model and the text that the README names."""
    shutil.copytree(tiny_folder, tmp_path / "SmolLM2")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (tmp_path / "SmolLM2" / "chat_template.jinja").write_text(template)
    row = '{"text": "One day a small bird sat in a big tree. The bird saw a red ball near the house."}\n'
    (tmp_path / "text.jsonl").write_text(row * 200)
    (sweep,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.DOTALL)
    (tmp_path / "sweep.yaml").write_text(sweep)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def compressed(workplace, compressed_once):
    """The checkpoint that most pages name."""
    recipe = Recipe(method_options={"iterations": 2}, samples=4, seq_len=32)
    return shutil.copytree(compressed_once(recipe), workplace / "SmolLM2-2of4")


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def quick(words):
    """A command on few tokens and with few iterations."""
    if words[0] not in ("plan", "compress"):
        return [*words, *LESS.get(words[0], [])]
    fewer = [] if "--method" in words or "quality" in words else FEW
    return [*words, *QUICK, *fewer, *(["--tune-block", "2", "--recover", "0.02"] if "speed" in words else [])]


def python(page, read=lambda codes: "\n".join(codes)):
    """The Python code of a page, run in this process."""
    exec(compile(read(blocks("python", (ROOT / "docs" / page).read_text())), page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "commands"), [("README.md", 5), ("docs/commands.md", 20)])
def test_every_command_of_the_readme_and_of_the_examples_runs(workplace, capsys, page, commands):
    text = (ROOT / page).read_text()
    lines = [line for block in blocks("console", text) for line in block.splitlines() if line.startswith("$ halfplate")]
    assert len(lines) >= commands
    of_sweeps = (ROOT / "docs" / "sweeps.md").read_text()  # they take long, and run below
    lines = [line for line in lines if not (line.startswith("$ halfplate sweep") and line.split("  ")[0] in of_sweeps)]
    for line in lines:
        words = quick(shlex.split(line.removeprefix("$ "), comments=True)[1:])
        assert main(words) == 0, line + capsys.readouterr().err
        assert capsys.readouterr().out.strip() or words[0] == "export", line


@pytest.mark.parametrize(("page", "commands"), [("methods.md", 7), ("choosing.md", 8)])
def test_every_command_of_a_page_runs(workplace, capsys, page, commands):
    lines = re.findall(r"^\$ halfplate (.*)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert len(lines) == commands
    for line in lines:
        assert main(quick(shlex.split(line))) == 0, line + capsys.readouterr().err
        assert "optimised for" in capsys.readouterr().out


def test_the_first_page_of_the_site_has_the_commands_of_the_readme(compressed):
    lines = re.findall(r"^\$ halfplate .*$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert lines == re.findall(r"^\$ halfplate .*$", README, re.MULTILINE)
    compressed.rename("SmolLM2-small")
    python("index.md")


@pytest.mark.parametrize("page", ["budget.md", "export.md", "factors.md", "pruning.md", "troubleshooting.md"])
def test_every_command_of_a_page_of_the_site_runs(compressed, capsys, page):
    lines = re.findall(r"^\$ halfplate (.*)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        assert main(quick(shlex.split(line, comments=True))) == 0, line + capsys.readouterr().err
    if page == "export.md":
        python(page)


def test_commands_of_the_page_on_experts_run(workplace, tiny_tokenizer, capsys):
    mixture = build_model("qwen3_moe", vocab_size=len(tiny_tokenizer), **MOE, head_dim=8)
    mixture.save_pretrained("Mixture")
    tiny_tokenizer.save_pretrained("Mixture")
    lines = re.findall(r"^\$ halfplate (.*)$", (ROOT / "docs" / "experts.md").read_text(), re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert main(quick(shlex.split(line))) == 0, line + capsys.readouterr().err


def test_commands_of_the_page_on_memory_run(workplace, capsys):
    lines = re.findall(r"^\$ (halfplate .*)$", (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert main(quick(shlex.split(line)[1:])) == 0, line + capsys.readouterr().err
    assert "holds the whole model" in capsys.readouterr().out


def test_python_of_the_readme_runs(workplace):
    (code,) = blocks("python")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (workplace / "SmolLM2-python" / "halfplate.json").exists()


@pytest.mark.parametrize("page", ["kernels.md", "decoding.md"])
def test_python_of_the_pages_on_speed_runs(compressed, capsys, page):
    python(page)
    assert "decoding: " in capsys.readouterr().out


def test_python_of_the_page_on_other_tools_runs(compressed, workplace):
    """In one session, from top to bottom; without peft up to where it is needed."""

    def read(codes):
        assert len(codes) == 3
        return "\n".join(code for code in codes if find_spec("peft") or "peft" not in code)

    python("ecosystem.md", read)
    if find_spec("peft") is None:
        pytest.skip("peft is not installed: its blocks were left out")
    assert (workplace / "merged" / "model.safetensors").is_file()


def test_python_of_the_page_on_logging_runs(workplace, capsys):
    python("logging.md")
    assert len(capsys.readouterr().out.splitlines()) == 14


def test_commands_of_the_page_on_sweeps_run(workplace, capsys):
    lines = re.findall(r"^\$ (halfplate .*)$", (ROOT / "docs" / "sweeps.md").read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line + capsys.readouterr().err
        assert "unpruned, core_dtype int3" in capsys.readouterr().out
    assert (workplace / "sweep-results" / "picture.svg").is_file()


def test_commands_of_the_page_on_the_report_run(compressed, workplace, capsys):
    lines = re.findall(r"^\$ (halfplate .*)$", (ROOT / "docs" / "report.md").read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line + capsys.readouterr().err
    assert (workplace / "page.html").is_file()


def test_the_page_on_texts_is_true(workplace, capsys):
    page = (ROOT / "docs" / "texts.md").read_text()
    (code,) = re.findall(r"```pycon\n(.*?)```", page, re.DOTALL)
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(code, {}, "texts.md", None, 0))
    assert runner.summarize(verbose=False) == (0, 11), capsys.readouterr().out
    for name in ("pairs.jsonl", "story.txt"):
        content = Path(name).read_bytes()
        Path(name).write_bytes(
            content * 100 if name == "pairs.jsonl" else ("Tom came home.\r\n" * 100).encode("utf-16")
        )
    lines = re.findall(r"^\$ halfplate (.*)$", page, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert main([*shlex.split(line), *(QUICK if line.startswith("compress") else [])]) == 0, capsys.readouterr().err
    assert json.loads(Path("SmolLM2-pairs/halfplate.json").read_text())["calibration"]["skipped_rows"] == 100


def test_tensorboard_example_runs(workplace, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    example = str(ROOT / "examples" / "track_with_tensorboard.py")
    monkeypatch.setattr(sys, "argv", [example, "SmolLM2", "out", "runs", *QUICK])
    runpy.run_path(example, run_name="__main__")
    drawn = EventAccumulator("runs").Reload()
    assert [event.step for event in drawn.Scalars("relative error/down_proj")] == [0, 1]
    assert len(drawn.Scalars("solver loss, last over first")) == 14


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert set(targets) == {"demo", "test"}
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_demo_runs_from_end_to_end(workplace, monkeypatch, capsys):
    begin, started = subprocess.run, []

    def run(command, **options):
        """The first process is the one that the demo starts; the others run in this one, which has imported torch."""
        if command[:3] != [sys.executable, "-m", "halfplate"]:
            return begin(command, **options)
        assert options == {"stdout": subprocess.PIPE, "text": True, "check": False}
        started.append(command[3])
        if len(started) == 1:
            return begin(command, **options)
        less = FEW if command[3] == "compress" and "sparsegpt" not in command else []
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = main([*command[3:], *less])
        return subprocess.CompletedProcess(command, status, said.getvalue())

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    demo = ROOT / "examples" / "demo.py"
    options = ["--model", "SmolLM2", "--samples", "5", "--seq-len", "32", "--windows", "3", "--recover", "0.02"]
    options += ["--prompt", "16"]
    monkeypatch.setattr(sys, "argv", [str(demo), *options])
    monkeypatch.setattr(subprocess, "run", run)
    runpy.run_path(str(demo), run_name="__main__")
    assert started[:4] == ["export", "sample", "compress", "sample"]
    shown = capsys.readouterr().out
    for name in ("default", "speed", "sparsegpt", "armor"):
        assert f"report: {Path('demo-out') / name / 'report.html'}" in shown
        assert (workplace / "demo-out" / name / "report.html").is_file()
        assert len(re.findall(rf"^  {name}: ", shown, re.MULTILINE)) == 3
    for expected in ("$ halfplate compress", "quality and speed against the original", "SparseGPT, 2:4", "minutes"):
        assert expected in shown


def test_links_lead_somewhere():
    for page in (
        ROOT / "README.md",
        ROOT / "RESULTS.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
