"""Scoring tasks with lm-eval."""

from pathlib import Path
from typing import Any

from halfplate.calibration.vocabulary import checking_tokens
from halfplate.errors import HalfplateError

MEASURES = ("acc", "acc_norm")


def check_available() -> None:
    """Raise HalfplateError if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise HalfplateError(
            "--tasks needs lm-eval, which is not installed; run `pip install 'halfplate[tasks]'`"
        ) from None


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    folder: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Score a transformers model with lm-eval: by task, `acc`, `acc_norm`, their standard errors, `rows`.

    Tasks without accuracy return all their measures.

    folder: more task definitions (lm-eval's `--include_path`).
    limit: only the first rows of each task.
    Raises HalfplateError for a task that lm-eval does not know.
    """
    check_available()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise HalfplateError(
            f"tasks_folder={folder!r} is not a folder; give one that holds task definitions of lm-eval"
        )
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise HalfplateError(
            f"tasks={','.join(unknown)!r}: lm-eval knows no such task; `lm_eval ls tasks` lists them, --tasks-folder adds your own"
        )
    try:
        with checking_tokens(model, tokenizer, f"tasks={','.join(tasks)!r}"):
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
    # Reading the data of a task can raise any exception.
    except (OSError, ConnectionError, ValueError, KeyError, AssertionError) as error:
        # lm-eval's assertions on lengths have no message.
        reason = " ".join(str(error).split())[:300] or "a row is longer than the context of the model"
        raise HalfplateError(
            f"tasks={','.join(tasks)!r} cannot be run by lm-eval ({reason}); check their data"
        ) from error
    assert found is not None
    return {task: _measures(found["results"][task]) | {"rows": found["n-samples"][task]["effective"]} for task in tasks}


def _measures(result: dict[str, Any]) -> dict[str, float]:
    """`acc,none` and the like under their plain names; all measures if there is no accuracy."""
    numbers = {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
    }
    chosen = {key: numbers[key] for key in MEASURES if key in numbers} or numbers
    rows = result.get("sample_len")
    if isinstance(rows, int) and rows > 1:
        # The standard error of a mean of zeros and ones, which lm-eval only computes with its bootstrap.
        chosen |= {
            f"{key}_stderr": (value * (1 - value) / (rows - 1)) ** 0.5
            for key, value in list(chosen.items())
            if key in MEASURES
        }
    return chosen
