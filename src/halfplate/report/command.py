"""The command that reproduces a checkpoint."""

import shlex
from dataclasses import fields
from typing import Any

from halfplate.arguments import FLAGS
from halfplate.recipe import Recipe, defaults_of

REPEATED = ("include", "exclude", "transforms", "types")


def compress_command(model: str, out: str, recipe: Recipe) -> str:
    """The `halfplate compress` command of a recipe for a shell: the pattern, and every value that is not a default."""
    # The pattern is always said: a command that chooses no format takes the recipe `everyday`.
    words = ["halfplate", "compress", model, "-o", out, f"--pattern={recipe.pattern}"]
    # Not `Recipe(method=...)`, which some methods refuse because they need an integer core.
    defaults = defaults_of(recipe)
    for name in (field.name for field in fields(Recipe) if field.name not in ("version", "pattern", "method_options")):
        value = getattr(recipe, name)
        if value == defaults[name]:
            continue
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        if name in REPEATED or (name == "calibration" and isinstance(value, tuple)):
            # One word with `=`, because a pattern may begin with a dash.
            words += [f"{flag}={pattern}" for pattern in value]
        elif value is True:
            words.append(flag)
        else:
            words.append(f"{flag}={','.join(value) if isinstance(value, tuple) else value}")
    words += [f"--option={name}={_spoken(value)}" for name, value in sorted(recipe.method_options.items())]
    return shlex.join(words)


def _spoken(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
