"""`--prefer`: the recipe of each word, options over it, contradictions, and models that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfplate.cli import build_parser
from halfplate.cli.preferences import PREFERENCES
from halfplate.cli.recipe_options import choice_from, recipe_from
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.recipe import Recipe

QUICK = ("--samples", "4", "--seq-len", "32", "--no-benchmark")


def recipe(*words: object) -> Recipe:
    return recipe_from(build_parser().parse_args(["plan", "MODEL", *map(str, words)]))


@pytest.fixture
def odd_folder(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A model with widths that no group and no M divides: 14 and 17."""
    sizes = {
        "hidden_size": 14,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "intermediate_size": 17,
    }
    folder = tmp_path / "odd"
    tiny_model("llama", vocab_size=len(tiny_tokenizer), **sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_each_word_is_its_recipe_and_size_is_the_default() -> None:
    for word, preference in PREFERENCES.items():
        assert recipe("--prefer", word) == Recipe.from_yaml(preference.recipe)
    assert recipe("--prefer", "size") == recipe() == Recipe.of()


def test_an_option_wins_and_the_rest_stays() -> None:
    fast = recipe("--prefer", "speed", "--core-dtype", "bf16")
    assert (fast.core_dtype, fast.pattern, fast.tune_block) == ("bf16", "2:4", 160)
    kept = recipe("--prefer", "size", "--group-size", "64", "--samples", "8")
    assert (kept.group_size, kept.samples, kept.core_dtype) == (64, 8, "nl4")
    assert recipe("--prefer", "size", "--budget", "0.5").choose == recipe("--budget", "0.5").choose == ("core_dtype",)
    assert recipe("--prefer", "size", "--budget", "0.5", "--choose", "pattern").choose == ("pattern",)


def test_contradictions_name_both(halfplate: Any, tiny_folder: Path) -> None:
    halfplate("plan", tiny_folder, "--prefer", "quality", "--recipe", "fast").refused(
        "--prefer quality", "--recipe fast"
    )
    halfplate("plan", tiny_folder, "--prefer", "quality", "--core-dtype", "bf16").refused(
        "--prefer quality: ", "core_dtype='bf16'"
    )
    halfplate("plan", tiny_folder, "--prefer", "fast").refused("invalid choice: 'fast'")


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        ((), "size, the default, recipe everyday"),
        (("--prefer", "quality"), "--prefer quality, recipe near-original"),
        (("--pattern", "2:4"), "your options"),
        (("--recipe", "quick-look"), "recipe quick-look"),
    ],
)
def test_the_plan_says_what_chose_and_why(
    halfplate: Any, tiny_folder: Path, words: tuple[str, ...], choice: str
) -> None:
    plan = halfplate("plan", tiny_folder, *QUICK, *words)
    lines = [" ".join(line.split()) for line in plan.out.splitlines()]
    assert f"choice {choice}" in lines
    reasons = [line for line in lines if line.startswith("why ")]
    assert len(reasons) == choice.count(", recipe ")
    assert halfplate("plan", tiny_folder, *QUICK, *words, "--json").json()["choice"]["choice"] == choice


def test_the_size_of_quality_and_of_the_default(
    halfplate: Any, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    tiny_model("llama", vocab_size=len(tiny_tokenizer), **sizes).save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    for word, most in (("quality", 0.55), ("size", 0.36)):
        plan = halfplate("plan", tmp_path / "wide", *QUICK, "--prefer", word, "--json").json()
        whole = plan["nbytes"] + plan["other_nbytes"]
        assert whole <= most * (plan["dense_nbytes"] + plan["other_nbytes"])


SPEED = ("--prefer", "speed", "--iterations", "2", "--tune-block", "2")


def test_speed_recovers_for_a_time_that_the_plan_names(
    halfplate: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = " ".join(halfplate("plan", tiny_folder, *QUICK, "--prefer", "speed").out.split())
    assert "recovery 30 min of training towards the original at the end" in plan
    assert (
        "recovery"
        not in halfplate("plan", tiny_folder, *QUICK, "--prefer", "speed", "--recover", "0", "--json").json()["choice"]
    )
    out = tmp_path / "out"
    command = ("compress", tiny_folder, "-o", out, *QUICK, *SPEED, "--recover", "0.02")
    done = halfplate(*command, "--json")
    recovery = done.json()["recovery"]
    assert done.status == 0
    assert recovery["after"]["kl"] < recovery["before"]["kl"]
    assert done.json()["verdict"]["figures"].startswith(f"KL {recovery['after']['kl']:.4g} ")
    record = json.loads((out / "halfplate.json").read_text())
    assert len(record["recoveries"]) == 1
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]
    page = (out / "report.html").read_text()
    assert "Verdict: " in page
    assert "then recovered 1" in page
    halfplate(*command, "--resume").refused("exists; choose another name")
    assert json.loads((out / "halfplate.json").read_text()) == record


def test_a_recovery_that_is_interrupted_goes_on(
    halfplate: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    command = ("compress", tiny_folder, "-o", out, *QUICK, "--method", "magnitude", "--recover", "0.02")
    with monkeypatch.context() as patch:
        patch.setattr("halfplate.recover", interrupted)
        assert halfplate(*command).status == 1
    assert (out / "halfplate.json").is_file()
    done = halfplate(*command, "--resume")
    assert done.status == 0, done.err
    assert "recoveries" in json.loads((out / "halfplate.json").read_text())


@pytest.mark.parametrize("reason", ["ruined", "refused"])
def test_a_recovery_that_does_not_help_leaves_the_result(
    halfplate: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def recover(model: Path, teacher: str, out: Path, **options: Any) -> None:
        if reason == "refused":
            raise HalfplateError("batch=2 does not fit into the memory")
        out.mkdir()
        raise RuinedResult("the KL did not fall; the result is kept at OUT")

    monkeypatch.setattr("halfplate.recover", recover)
    out = tmp_path / "out"
    done = halfplate("compress", tiny_folder, "-o", out, *QUICK, *SPEED, "--recover", "1")
    assert done.status == 0
    why = {"ruined": "the KL did not fall", "refused": "batch=2 does not fit into the memory"}[reason]
    assert f"recovery: without success; OUT is as compressed: {why}" in done.out.splitlines()
    assert done.out.splitlines()[-1].startswith("verdict: ")
    assert "recoveries" not in json.loads((out / "halfplate.json").read_text())
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_the_kl_limit_is_for_the_recovered_model(halfplate: Any, tiny_folder: Path, tmp_path: Path) -> None:
    options = (*QUICK, "--method", "magnitude", "--recover", "0.01", "--max-kl", "1e-9")
    done = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *options)
    assert done.status == 1
    assert "exceeds it after the recovery" in done.err
    assert (tmp_path / "out" / "halfplate.json").is_file()


def test_minutes_that_are_none_are_refused(halfplate: Any, tiny_folder: Path, tmp_path: Path) -> None:
    halfplate("plan", tiny_folder, "--recover", "-1").refused("--recover -1 must be minutes")
    halfplate("plan", tiny_folder, "--recover", "nan").refused("--recover nan must be minutes")


def test_a_model_that_2_of_4_does_not_fit_gets_the_next_best(halfplate: Any, odd_folder: Path, tmp_path: Path) -> None:
    plan = " ".join(halfplate("plan", odd_folder, *QUICK, "--prefer", "speed").out.split())
    assert "choice size instead of --prefer speed, recipe everyday" in plan
    assert "2:4 needs widths that are multiples of 4, and only" in plan
    done = halfplate("compress", odd_folder, "-o", tmp_path / "out", *QUICK, "--prefer", "speed", "--quiet")
    assert done.status == 0
    assert done.err.startswith("halfplate: size instead of --prefer speed: 2:4 needs widths")
    args = build_parser().parse_args(["plan", str(odd_folder), *QUICK, "--prefer", "speed", "--include", "*.gate_proj"])
    choice, found = choice_from(args)
    assert (choice.fallback, found.core_dtype) == (
        "2:4 needs widths that are multiples of 4, and no matrix has them",
        "nl4",
    )


@pytest.mark.parametrize("word", ["size", "quality"])
def test_widths_that_no_group_divides(halfplate: Any, odd_folder: Path, tmp_path: Path, word: str) -> None:
    done = halfplate("compress", odd_folder, "-o", tmp_path / "out", *QUICK, "--prefer", word, "--quiet")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1].startswith("verdict: ")
