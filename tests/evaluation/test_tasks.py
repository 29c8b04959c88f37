"""Scoring on tasks: lm-eval's own figures, for dense and compressed models, and clear words where it cannot."""

import builtins
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from halfplate.cli import main

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'halfplate[tasks]')")

YAML = """
task: birds
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """lm-eval reads its own 14,000 definitions each time it is asked for a task, which takes it seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture
def tasks_folder(tmp_path, own_tasks_alone):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"The bird number {k} saw", "choices": ["a red ball", "the big old house", "two"], "answer": k % 3}
        for k in range(12)
    ]
    (tmp_path / "birds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "birds.yaml").write_text(YAML.format(file=tmp_path / "birds.jsonl"))
    return folder


def scores(capsys, *words):
    capsys.readouterr()
    status = main([*map(str, words), "--json", "--quiet"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.slow
def test_a_dense_model_scores_as_by_lm_eval_itself(tiny_folder, tasks_folder, capsys):
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = scores(capsys, "eval", tiny_folder, "--tasks", "birds", "--tasks-folder", tasks_folder)["tasks"]["birds"]
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny_folder), "device": "cpu", "dtype": "float32"},
        tasks=["birds"],
        task_manager=TaskManager(include_path=str(tasks_folder)),
        batch_size=8,
        bootstrap_iters=0,
    )["results"]["birds"]
    assert (found["acc"], found["acc_norm"]) == (expected["acc,none"], expected["acc_norm,none"])
    assert found["rows"] == 12


@pytest.mark.slow
def test_the_tasks_of_the_benchmarks_score_as_by_lm_eval_itself(stories260k, own_tasks_alone, monkeypatch, capsys):
    """A trained model on real rows, so that no figure agrees by being chance or zero."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = stories260k.parents[1] / "data"
    if not data.is_dir():
        pytest.skip("the data of the tasks are not in shared/data")
    monkeypatch.setenv("HALFPLATE_TASK_DATA", str(data))
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "tasks"
    names = ["piqa_local", "arc_easy_local", "openbookqa_local", "hellaswag_local"]
    words = ("eval", stories260k, "--tasks", ",".join(names), "--tasks-folder", folder, "--limit", "16")
    found = scores(capsys, *words)["tasks"]
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(stories260k), "device": "cpu", "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=str(folder)),
        limit=16,
        batch_size=8,
        bootstrap_iters=0,
    )["results"]
    for name in names:
        assert (found[name]["acc"], found[name]["acc_norm"]) == (
            expected[name]["acc,none"],
            expected[name]["acc_norm,none"],
        )
        assert found[name]["rows"] == 16


@pytest.mark.slow
def test_a_checkpoint_is_scored_beside_its_other_measures(tiny_folder, tasks_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compress", str(tiny_folder), "-o", str(out), "--method", "magnitude", "--quiet"]) == 0
    words = ("eval", out, "--tasks", "birds", "--tasks-folder", tasks_folder, "--limit", "5")
    alone = scores(capsys, *words)
    assert set(alone) == {"tasks"}
    assert alone["tasks"]["birds"]["rows"] == 5
    both = scores(capsys, *words, "--against", tiny_folder, "--windows", "2", "--seq-len", "32")
    assert both["tasks"] == alone["tasks"]
    assert both["kl"] > 0


@pytest.mark.slow
def test_what_lm_eval_does_not_know_is_refused(tiny_folder, tasks_folder, tmp_path, capsys):
    for words, part in (
        (("--tasks", "birds"), "lm-eval knows no such task"),
        (("--tasks", "birds,fish", "--tasks-folder", tasks_folder), "tasks='fish'"),
        (("--tasks", "birds", "--tasks-folder", tmp_path / "none"), "is not a folder"),
    ):
        assert main(["eval", str(tiny_folder), *map(str, words)]) == 2
        assert part in capsys.readouterr().err
    row = {"question": "The bird saw", "choices": ["a red ball " * 4000, "two"], "answer": 0}
    (tmp_path / "birds.jsonl").write_text(json.dumps(row))
    assert main(["eval", str(tiny_folder), "--tasks", "birds", "--tasks-folder", str(tasks_folder)]) == 2
    assert "longer than the context of the model" in capsys.readouterr().err
    (tmp_path / "birds.jsonl").unlink()
    assert main(["eval", str(tiny_folder), "--tasks", "birds", "--tasks-folder", str(tasks_folder)]) == 2
    assert "cannot be run by lm-eval" in capsys.readouterr().err


def test_without_lm_eval_the_cure_is_named(tiny_folder, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "lm_eval":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["eval", str(tiny_folder), "--tasks", "birds"]) == 2
    assert "pip install 'halfplate[tasks]'" in capsys.readouterr().err


# lm-eval's own command line, started as documented but in one process, once for each line of arguments.
HARNESS = """
import runpy, sys
from functools import partial
from lm_eval import tasks

tasks.TaskManager = partial(tasks.TaskManager, include_defaults=False)
for line in sys.argv[1:]:
    sys.argv[1:] = line.split()
    runpy.run_module("halfplate.evaluation.harness", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_lm_evals_command_line_scores_a_checkpoint_as_eval_does(tiny_folder, tasks_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compress", str(tiny_folder), "-o", str(out), "--method", "magnitude", "--quiet"]) == 0
    found = scores(capsys, "eval", out, "--tasks", "birds", "--tasks-folder", tasks_folder)["tasks"]["birds"]
    models = {"halfplate": f"pretrained={out}", "hf": f"pretrained={out},dtype=float32"}
    lines = [
        f"run --model {name} --model_args {arguments} --tasks birds --include_path {tasks_folder} "
        f"--output_path {tmp_path / name} --batch_size 8 --device cpu"
        for name, arguments in models.items()
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", HARNESS, *lines], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    for name in models:
        (results,) = (tmp_path / name).rglob("results_*.json")
        birds = json.loads(results.read_text())["results"]["birds"]
        assert (birds["acc,none"], birds["acc_norm,none"]) == (found["acc"], found["acc_norm"]), name
