"""The verdict: each measured point gets its grade, and a damaged model the command that does better."""

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import halfplate
from halfplate.cli import build_parser
from halfplate.cli.recipe_options import recipe_from
from halfplate.evaluation.verdict import DAMAGED, GRADES, grade_of, verdict_of
from halfplate.recipe import Recipe

NAMES = [grade.name for grade in GRADES]


# Measured on SmolLM2-135M (RESULTS.md): the KL, and the place of its grade.
@pytest.mark.parametrize(
    ("kl", "place"),
    [(0.0019, 0), (0.018, 0), (0.073, 1), (0.123, 1), (0.22, 2), (0.402, 2), (0.544, 3), (0.64, 3), (1.9, 3)],
)
def test_measured_points_have_their_grade(kl: float, place: int) -> None:
    assert grade_of(kl).name == NAMES[place]


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_damage(kl: float) -> None:
    assert grade_of(kl) is DAMAGED


def test_thresholds_rise_and_end_in_all() -> None:
    most = [grade.most_kl for grade in GRADES]
    assert most == sorted(set(most))
    assert most[-1] == math.inf
    assert all(grade_of(grade.most_kl) is grade for grade in GRADES)


def verdict(kl: float, recipe: Recipe | None, folder: str | None = "my out") -> Any:
    return verdict_of({"kl": kl, "top1_agreement": 0.5, "perplexity": 30.0}, recipe, "m/SmolLM2", folder)


@pytest.mark.parametrize(
    ("recipe", "ending"),
    [
        (Recipe(), "halfplate compress m/SmolLM2 -o 'my out-default'"),
        (Recipe(core_dtype="int8"), "halfplate compress m/SmolLM2 -o 'my out-default'"),
        (Recipe(core_dtype="int4"), "--pattern dense --core-dtype nl3 --block-size 0 --group-size 128"),
        (Recipe(core_dtype="int5", block_size=0), "nl3 --block-size 0 --group-size 128"),
        (Recipe(core_dtype="int4", embedding_dtype="int8"), "--group-size 128 --embedding-dtype int8"),
        (Recipe(core_dtype="int3", block_size=0), "halfplate compress m/SmolLM2 -o 'my out-default'"),
        (Recipe(pattern="dense", core_dtype="int2"), "halfplate compress m/SmolLM2 -o 'my out-default'"),
        (Recipe(pattern="dense", core_dtype="nl3", block_size=0), "halfplate compress m/SmolLM2 -o 'my out-default'"),
        (
            Recipe(pattern="dense", core_dtype="nl4", group_size=32),
            "the default, which is larger: halfplate compress m/SmolLM2 -o 'my out-default'",
        ),
        (Recipe(pattern="dense", core_dtype="int8"), "--prefer quality"),
        (Recipe.of(), "--prefer quality"),
        (Recipe(budget=0.3), "halfplate compress m/SmolLM2 -o 'my out-default'"),
        (
            Recipe(calibration=("a b.txt:0.5", "self:0.5"), seq_len=128),
            "'--calibration=a b.txt:0.5' --calibration=self:0.5 --seq-len=128",
        ),
        (None, "halfplate compress m/SmolLM2 -o 'my out-default'"),
    ],
)
def test_a_damaged_model_is_told_what_does_better(recipe: Recipe | None, ending: str) -> None:
    sentence = verdict(0.9, recipe).sentence
    assert sentence.startswith("damaged. ")
    assert "halfplate recover 'my out' --teacher m/SmolLM2 -o 'my out-recovered' --minutes 30" in sentence
    assert sentence.endswith(ending)
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(core_dtype="int4"),
        Recipe(pattern="dense", core_dtype="int2"),
        Recipe(pattern="dense", core_dtype="nl4"),
    ],
)
def test_every_command_is_one_that_halfplate_reads(recipe: Recipe) -> None:
    for _, command in verdict(0.9, recipe).advice:
        build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(block_size=16),
        Recipe(core_dtype="int8", block_size=0, embedding_dtype="int8", head_dtype="int8"),
        Recipe(core_dtype="int5", block_size=0, embedding_dtype="int8", head_dtype="int8"),
        Recipe(core_dtype="nl4", block_size=16, wrapper_dtype="int8", embedding_dtype="auto", head_dtype="auto"),
    ],
)
def test_what_is_said_to_have_no_more_bytes_has_none(
    recipe: Recipe, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = tmp_path / "wide"
    tiny_model("llama", vocab_size=len(tiny_tokenizer), **sizes).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    small = replace(recipe, samples=4, seq_len=32)
    verdict = verdict_of({"kl": 0.9}, small, str(model), "out")
    assert verdict is not None
    what, command = verdict.advice[1]
    assert what.endswith("of no more bytes")
    advised = recipe_from(build_parser().parse_args(shlex.split(command)[1:]))
    assert (advised.samples, advised.seq_len) == (4, 32)
    own, other = (halfplate.plan(model, found) for found in (small, advised))
    assert other.nbytes + other.other_nbytes <= 1.01 * (own.nbytes + own.other_nbytes)


def test_a_pruned_model_is_told_of_recovery_before_it_is_damaged() -> None:
    (advice,) = verdict(0.4, Recipe()).advice
    assert "halfplate recover" in advice[1]
    assert verdict(0.4, Recipe(pattern="dense", core_dtype="int3")).advice == ()
    assert verdict(0.1, Recipe()).advice == ()


def test_a_model_of_another_program_is_told_of_the_default() -> None:
    ((_, command),) = verdict(0.9, None, folder=None).advice
    assert command == "halfplate compress m/SmolLM2 -o OUT"


@pytest.mark.parametrize("measures", [{}, {"kl": None}, {"kl": "0.1"}, {"kl": True}])
def test_without_a_kl_there_is_no_verdict(measures: dict[str, Any]) -> None:
    assert verdict_of(measures, None, None, None) is None
