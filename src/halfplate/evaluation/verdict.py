"""A verdict in words: what the measurements against the original model mean for someone who uses the result."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfplate.recipe import KEEP, Recipe, defaults_of
from halfplate.recipe_values import types_in

RECOVERY_MINUTES = 30
WIDTH = 4096  # of the matrix whose bytes are compared
ENOUGH = 1.01  # bytes that count as equal
# The least bytes at which an unpruned core still gives sensible text.
UNPRUNED: dict[str, Any] = {"pattern": "dense", "core_dtype": "nl3", "block_size": 0, "group_size": 128}
KEPT = ("calibration", "samples", "seq_len", "include", "exclude", "transforms", "device")


@dataclass(frozen=True)
class Grade:
    """A grade and its meaning in one sentence. most_kl: the largest KL to the original that it is given for, in nats per token."""

    name: str
    most_kl: float
    meaning: str


# The thresholds, best first. docs/choosing.md has the measurements that they come from.
GRADES = (
    Grade("nearly indistinguishable", 0.02, "Hardly an answer differs from one of the original."),
    Grade("small loss", 0.15, "Most answers stay the same, and some are worded differently."),
    Grade("noticeable loss", 0.5, "The text stays fluent, and facts and details are wrong more often."),
    Grade("damaged", math.inf, "It forgets facts and loses the thread."),
)
DAMAGED = GRADES[-1]


@dataclass(frozen=True)
class Verdict:
    """A graded measurement.

    figures: KL, top-1 agreement and perplexity, as one line of text.
    advice: what does better at the same size or speed, as text and a command each; empty if nothing is needed.
    """

    grade: Grade
    figures: str
    advice: tuple[tuple[str, str], ...] = ()

    @property
    def damaged(self) -> bool:
        """Whether the model should not be used as it is."""
        return self.grade is DAMAGED

    @property
    def sentence(self) -> str:
        """The grade, its meaning, and the commands that do better, on one line."""
        better = "; or ".join(f"{what}: {command}" for what, command in self.advice)
        return f"{self.grade.name}. {self.grade.meaning}" + (f" {better[0].upper()}{better[1:]}" if better else "")

    def to_json(self) -> dict[str, Any]:
        """The entry `verdict` of `compress --json` and `eval --json`."""
        return {
            "grade": self.grade.name,
            "sentence": self.sentence,
            "figures": self.figures,
            "advice": [{"what": what, "command": command} for what, command in self.advice],
        }


def grade_of(kl: float) -> Grade:
    """The grade of a KL to the original, in nats per token; NaN is damaged."""
    return next((grade for grade in GRADES if kl <= grade.most_kl), DAMAGED)


def verdict_of(
    measures: Mapping[str, Any], recipe: Recipe | None, model: str | None, folder: str | None
) -> Verdict | None:
    """The verdict on `measures` with the keys of `evaluation.evaluate`; None if they have no KL.

    recipe: the recipe that made the model, None if it is unknown or the model is not a Halfplate checkpoint.
    model: the original model, None if it is unknown.
    folder: the judged checkpoint, None if it is not one.
    """
    kl = measures.get("kl")
    if isinstance(kl, bool) or not isinstance(kl, int | float):
        return None
    grade = grade_of(kl)
    # A pruned model that nothing was trained for gains most from recovery, so it is named before the model is damaged.
    wanted = grade is DAMAGED or (grade is GRADES[-2] and recipe is not None and not recipe.parsed_pattern.is_dense)
    better = _better(recipe, model or "ORIGINAL", folder) if wanted else ()
    return Verdict(grade, _figures(measures), better if grade is DAMAGED else better[:1])


def _figures(measures: Mapping[str, Any]) -> str:
    def known(key: str) -> float | None:
        value = measures.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    parts = [f"KL {measures['kl']:.4g} nats per token"]
    if (agreement := known("top1_agreement")) is not None:
        parts.append(f"top-1 agreement {agreement:.1%}")
    if (perplexity := known("perplexity")) is not None:
        original = known("dense_perplexity")
        parts.append(f"perplexity {perplexity:.4g}" + ("" if original is None else f" (original {original:.4g})"))
    return ", ".join(parts)


def recovery_command(model: str, folder: str) -> str:
    """The command that trains the checkpoint `folder` towards the original `model`."""
    words = ["halfplate", "recover", folder, "--teacher", model, "-o", f"{folder}-recovered"]
    return shlex.join([*words, "--minutes", str(RECOVERY_MINUTES)])


def _better(recipe: Recipe | None, model: str, folder: str | None) -> tuple[tuple[str, str], ...]:
    """What loses less than a result of `recipe`: recovery, which keeps size and speed, and another format, of no more bytes if there is one."""
    if folder is None:
        return (
            ("choose the default, about a third of the original", f"halfplate compress {shlex.quote(model)} -o OUT"),
        )
    found = [("recover it at the same size and speed", recovery_command(model, folder))]

    def choose(what: str, name: str, *options: str) -> tuple[tuple[str, str], ...]:
        words = ["halfplate", "compress", model, "-o", f"{folder}-{name}", *options, *_kept(recipe)]
        return (*found, (f"choose {what}", shlex.join(words)))

    if recipe is None or recipe.budgeted:
        return choose("the default", "default")
    own, default = _nbytes(recipe), _nbytes(Recipe.of())
    if recipe.parsed_pattern.is_dense and own * ENOUGH >= default:
        return choose("more bits", "quality", "--prefer", "quality")
    if own * ENOUGH >= default:
        return choose("the default, of no more bytes", "default")
    tables = [
        word
        for flag, dtype in (("--embedding-dtype", recipe.embedding_dtype), ("--head-dtype", recipe.head_dtype))
        for word in (flag, dtype)
        if dtype != KEEP
    ]
    if own * ENOUGH >= _nbytes(Recipe(**UNPRUNED)) and not recipe.parsed_pattern.is_dense:
        options = [word for name, value in UNPRUNED.items() for word in (_flag(name), str(value))]
        return choose("an unpruned core of no more bytes", "unpruned", *options, *tables)
    return choose("the default, which is larger", "default")


def _nbytes(recipe: Recipe) -> int:
    """Bytes of a matrix of usual size in the middle of its types, with the smallest wrappers if planning chooses them."""
    block = 1 if recipe.block_size == "auto" and recipe.create_method().wrapped else recipe.block_size
    size, cores = block if isinstance(block, int) else 0, {(recipe.core_dtype, None), *types_in(recipe.types)}
    return sum(recipe.spec(WIDTH, WIDTH, size, *core).nbytes for core in cores) // len(cores)


def _kept(recipe: Recipe | None) -> list[str]:
    """The options of `recipe` that choose no format, where they are not the defaults."""
    if recipe is None:
        return []
    words, defaults = list[str](), defaults_of(recipe)
    for name in KEPT:
        value = getattr(recipe, name)
        if value != defaults[name]:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"{_flag(name)}={one}" for one in values]
    return words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
