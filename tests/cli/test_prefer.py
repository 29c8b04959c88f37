"""`--prefer`: the recipe of each word, options over it, contradictions, and models that do not fit."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from halfplate.cli import build_parser, main
from halfplate.cli.preferences import PREFERENCES
from halfplate.cli.recipe_options import choice_from, recipe_from
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


def test_speed_names_the_recovery_and_its_command_works(
    halfplate: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = " ".join(halfplate("plan", tiny_folder, *QUICK, "--prefer", "speed", "-o", "out").out.split())
    command = f"halfplate recover out --teacher {tiny_folder} -o out-recovered --minutes 30"
    assert f"afterwards 30 min of recovery, not part of this run: {command}" in plan
    quick = ("--iterations", "2", "--tune-block", "2")
    monkeypatch.setattr("halfplate.evaluation.verdict.grade_of", lambda kl: halfplate_grade("noticeable loss"))
    done = halfplate("compress", tiny_folder, "-o", "out", *QUICK, "--prefer", "speed", *quick)
    assert done.out.splitlines()[-1].endswith(f"Recover it at the same size and speed: {command}")
    words = [word if word != "--minutes" else "--tokens" for word in shlex.split(command)[1:-1]]
    assert main([*words, "512", "--samples", "8", "--seq-len", "32", "--quiet"]) in (0, 1)
    assert (tmp_path / "out-recovered" / "halfplate.json").is_file()


def halfplate_grade(name: str) -> Any:
    from halfplate.evaluation.verdict import GRADES

    return next(grade for grade in GRADES if grade.name == name)


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
