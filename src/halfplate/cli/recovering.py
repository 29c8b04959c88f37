"""The recovery at the end of `compress`, with `--prefer speed` or `--recover MINUTES`."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.cli.preferences import SPEED, Choice
from halfplate.errors import HalfplateError, RuinedResult

if TYPE_CHECKING:
    from halfplate.recipe import Recipe
    from halfplate.telemetry.progress import Report


def minutes_of(args: argparse.Namespace, choice: Choice) -> float:
    """Minutes of training after the compression; 0 for none. Raises HalfplateError for a negative number."""
    from halfplate.evaluation.verdict import RECOVERY_MINUTES

    if args.recover is None:
        return RECOVERY_MINUTES if choice.word == SPEED else 0
    minutes = float(args.recover)
    if not 0 <= minutes < float("inf"):
        raise HalfplateError(f"--recover {minutes:g} must be minutes, 0 or more; try 30, or 0 for none")
    return minutes


def before_recovery(recipe: Recipe) -> Recipe:
    """The recipe of the compression alone: the KL limit is for what the recovery leaves."""
    return replace(recipe, max_kl=None)


def recovered(args: argparse.Namespace, recipe: Recipe, minutes: float, report: Report) -> dict[str, Any]:
    """Train the checkpoint at `args.out` towards `args.model`, and put the result in its place.

    Returns the measurements before and after, `{}` if the checkpoint was recovered by an earlier call, or `{"left_out": reason}` if it
    cannot be trained or training did not help; the checkpoint then stays as it was. Ctrl-C keeps the state for --resume.
    """
    import halfplate
    from halfplate.checkpoint.config import read_record
    from halfplate.checkpoint.folder import replace_folder
    from halfplate.telemetry.log import append

    out = Path(args.out)
    if read_record(out).get("recoveries"):
        return {}
    trained = out.resolve().with_name(f".{out.resolve().name}.recovered")
    text = recipe.calibration if isinstance(recipe.calibration, str) and not recipe.sampled else "self"
    try:
        found = halfplate.recover(
            out,
            args.model,
            trained,
            minutes=minutes,
            seq_len=recipe.seq_len,
            text=text,
            overwrite=True,
            resume=args.resume,
            report=report,
            device=recipe.device,
        )
    except RuinedResult as error:
        shutil.rmtree(trained, ignore_errors=True)
        return {"left_out": str(error).partition("; the result is kept")[0]}
    except HalfplateError as error:
        return {"left_out": str(error)}
    measured = {key: value for key, value in (found or {}).items() if key in ("before", "after")}
    _keep_log(out, trained)
    if "after" in measured:
        quality = measured["after"] | {"protocol": {"source": "self" if text == "self" else text}}
        append(trained, {"event": "measures", "against": args.model, "quality": quality})
    replace_folder(trained, out.resolve())
    halfplate.write_report(out)
    return measured


def _keep_log(out: Path, trained: Path) -> None:
    """Put the log of the compression before that of the recovery, without its start and end, which the report reads."""
    from halfplate.telemetry.log import LOG_FILE

    logs = [folder / LOG_FILE for folder in (out, trained)]
    before, added = (log.read_text(encoding="utf-8") if log.is_file() else "" for log in logs)
    lines = [line for line in added.splitlines(keepends=True) if json.loads(line).get("event") not in ("start", "end")]
    logs[1].write_text(before + "".join(lines), encoding="utf-8")


def check_limit(recipe: Recipe, out: str, measures: dict[str, Any]) -> None:
    """Raise RuinedResult if the KL exceeds `recipe.max_kl`."""
    kl = measures.get("kl")
    if recipe.max_kl is not None and not (kl is not None and kl <= recipe.max_kl):
        raise RuinedResult(
            f"max_kl={recipe.max_kl}: KL {kl if kl is None else f'{kl:.4g}'} nats per token exceeds it after the recovery; the checkpoint is kept at {out!r}; "
            "recover longer, or choose another format"
        )
