"""Recovery as a job: read, generate text, train, write, evaluate. It can be resumed, and runs under `accelerate launch`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from halfplate.calibration import calibration_tokens
from halfplate.calibration.documents import Text
from halfplate.calibration.text import check_seq_len, check_tokens_fit
from halfplate.calibration.vocabulary import check_tokens, vocabulary_of
from halfplate.checkpoint.config import RECORD_FILE, other_dtype, pruning_of, read_record, read_specs
from halfplate.checkpoint.output import LOCK_FILE, check_place, check_result_folder, sole_user
from halfplate.checkpoint.read import load, load_tokenizer
from halfplate.checkpoint.write import write_checkpoint
from halfplate.defaults import plain_defaults
from halfplate.device import check_device
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.evaluation.perplexity import evaluate, token_windows
from halfplate.formats import WeightSpec
from halfplate.headroom import check_memory
from halfplate.models.sources import Source, is_compressed, load_dense, open_source
from halfplate.models.sources import load_tokenizer as load_dense_tokenizer
from halfplate.recovery.distillation import Progress, check_trainable, in_training, train
from halfplate.recovery.settings import HELD_OUT, Recovery
from halfplate.recovery.state import State, load_state, save_state
from halfplate.runtime.sampling import native_sampling
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.log import run_log
from halfplate.telemetry.progress import Report, silent

SAVE_MINUTES = 5.0
TEXT = "text-"  # and a digest of everything that a generated text depends on, so that runs with other settings can reuse it


@plain_defaults()
def recover(
    model: str | Path,
    teacher: str,
    out: str | Path,
    settings: Recovery,
    overwrite: bool = False,
    resume: bool = False,
    report: Report = silent,
    save_minutes: float = SAVE_MINUTES,
    device: str = "cpu",
) -> dict[str, Any] | None:
    """Train the checkpoint or pruned model `model` towards the original `teacher`, write the result to `out` and return the summary.

    The masks are fixed. Of a pruned model that is not compressed, the linears of its layers are trained. The state is saved about every `save_minutes` in a hidden folder next to `out`, which is removed when
    `out` is complete. Under `accelerate launch` each process takes its share of every batch; all except the main one return None.

    resume: continue from the saved state.
    Raises HalfplateError on bad input (e.g. a teacher with another vocabulary or depth, or a state of other settings), and
    RuinedResult, after writing `out`, if the held-out KL did not fall.
    """
    base, out = Path(model), Path(out)
    if not save_minutes >= 0:
        raise HalfplateError(
            f"save_every={save_minutes} must be minutes between two saves, 0 or more; try {SAVE_MINUTES:g}"
        )
    check_device(device)
    check_place(out)
    if not is_compressed(base) and pruning_of(base) is None:
        raise HalfplateError(
            f"model={str(model)!r} is not a Halfplate checkpoint; give the OUT of halfplate compress, or of halfplate prune"
        )
    source = _open_teacher(teacher)
    check_trainable(source, _specs(base), settings)
    tokenizer = load_dense_tokenizer(source)
    _check_tokenizer(base, source.name, tokenizer)
    accelerator = Accelerator(cpu=device == "cpu")
    report = report if accelerator.is_main_process else silent
    if settings.text == "self":
        check_tokens_fit("samples", settings.samples, settings.seq_len)
    given = None if settings.text == "self" else _given_windows(settings, tokenizer)
    identity = _identity(base, source, settings, given)
    finished = _finished(out, identity) if resume else None
    work = out.resolve().with_name(f".{out.resolve().name}.recovery")
    if finished is not None:
        if not accelerator.is_main_process:
            return None
        if work.is_dir():  # of a run that was killed after its result was complete
            with sole_user(work, out):
                shutil.rmtree(work, ignore_errors=True)
        return finished
    check_result_folder(out, overwrite, source.path)
    if out.resolve() == base.resolve():
        raise HalfplateError(f"out={str(out)!r} is the checkpoint that is read; choose another folder")
    order = _Order(base, out, source, settings, given, identity, accelerator, work, overwrite or resume, save_minutes)
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        _carry_out(order, report)
        return None
    with _begun(order, overwrite, resume), run_log(out, report, resume) as told:
        accelerator.wait_for_everyone()
        return _carry_out(order, told)


@dataclass(frozen=True)
class _Order:
    """The checked arguments of a recovery. given: windows, if they are not generated."""

    base: Path
    out: Path
    source: Source
    settings: Recovery
    given: Tensor | None
    identity: dict[str, Any]
    accelerator: Accelerator
    work: Path
    replace: bool
    save_minutes: float


def _carry_out(order: _Order, report: Report) -> dict[str, Any]:
    """Train, write and evaluate; returns the summary, which has no measurements except in the main process."""
    settings, accelerator, work = order.settings, order.accelerator, order.work
    asked = {
        "event": "recovery",
        "model": str(order.base),
        "teacher": order.source.name,
        "settings": settings.to_json(),
    }
    clock = Clock()
    with clock("reading"):
        report("reading", 0, 1, facts=asked)
        student = load(order.base, kernels=False) if _specs(order.base) else load_dense(str(order.base)).model
        _check_teacher(order.source, student, settings, _made_smaller(order.base))
        _check_batch(student, settings, accelerator.num_processes)
        if order.given is not None:
            check_tokens(order.given, student, f"text={settings.text!r}", load_tokenizer(order.base))
        dense = load_dense(order.source)
        student.to(accelerator.device)  # type: ignore[arg-type]
        dense.model.to(accelerator.device)  # type: ignore[arg-type]
        report("reading", 1, 1)
    with clock("text"):
        given = order.given
        windows = (
            _sampled(settings, dense, work, order.identity["teacher"], accelerator, report) if given is None else given
        )
    held_out, training = windows[: _held_out(len(windows))], windows[_held_out(len(windows)) :]

    state = load_state(work, order.identity)
    with clock("judging"):
        before = _judged(student, dense.model, held_out, accelerator) if state is None else state.facts["before"]
    with clock("training"), in_training(student, settings) as parameters:
        count = sum(parameter.numel() for parameter in parameters.values())
        progress = train(
            student,
            dense.model,
            training,
            parameters,
            settings,
            accelerator,
            state,
            lambda now: save_state(
                work, State(now.tensors, now.facts | {"identity": order.identity, "before": before})
            ),
            60 * order.save_minutes,
            lambda now, done: _tell(report, settings, now, done),
        )
    facts = {
        "teacher": order.source.name,
        "settings": settings.to_json(),
        "identity": order.identity,
        "processes": accelerator.num_processes,
        "trained_parameters": count,
        "tokens": progress.tokens,
        "steps": progress.steps,
        "text": {"windows": len(windows), "held_out": len(held_out), "sha256": _sha256(windows)},
    }
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return facts
    with clock("writing"):
        record = _record(read_record(order.base), facts)
        specs, tokenizer = _specs(order.base), load_tokenizer(order.base)
        # The next run finds and removes what a killed process leaves here.
        partial, dtype = work / "result.partial", other_dtype(order.base)
        write_checkpoint(
            student.cpu(), tokenizer, order.out, specs, record, dtype, order.replace, partial=partial, beside=order.base
        )
    with clock("judging"):
        student.to(accelerator.device)  # type: ignore[arg-type]
        after = _judged(student, dense.model, held_out, accelerator)
    measured = {"before": before, "after": after, "seconds": clock.seconds}
    report("judging", 1, 1, facts={"event": "end", **measured})
    shutil.rmtree(work, ignore_errors=True)
    accelerator.wait_for_everyone()
    if not after["kl"] < before["kl"]:
        raise RuinedResult(
            f"learning_rate={settings.learning_rate}: the KL on held-out text did not fall ({before['kl']:.4g} to {after['kl']:.4g} nats per "
            f"token); the result is kept at {str(order.out)!r}; try a lower rate or more tokens"
        )
    return facts | {"out": str(order.out), "model": str(order.base)} | measured


def _specs(base: Path) -> dict[str, WeightSpec]:
    """The compressed matrices of a checkpoint; none in a model that is only pruned."""
    return read_specs(base) if is_compressed(base) else {}


def _made_smaller(base: Path) -> bool:
    """Whether a transform has made the model smaller than its teacher."""
    recipe = read_record(base).get("recipe")
    return pruning_of(base) is not None or (isinstance(recipe, dict) and recipe.get("keep") is not None)


def _identity(base: Path, source: Source, settings: Recovery, given: Tensor | None) -> dict[str, Any]:
    """Everything that must be equal to continue from a state."""
    identity = settings.to_json() | {
        "model": hashlib.sha256((base / RECORD_FILE).read_bytes()).hexdigest(),
        "teacher": source.sha256(),
    }
    # Generated text follows from the rest; a file may have changed under the same name.
    return identity if given is None else identity | {"windows": _sha256(given)}


def _finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The record of `out` if it is the complete result of the same recovery."""
    if not (out / RECORD_FILE).is_file():
        return None
    recoveries = read_record(out).get("recoveries")
    last = recoveries[-1] if isinstance(recoveries, list) and recoveries else {}
    return last | {"out": str(out)} if last.get("identity") == identity else None


@contextmanager
def _begun(order: _Order, overwrite: bool, resume: bool) -> Iterator[None]:
    """Context manager that creates and locks the folder of the state; an old state is removed unless it is resumed.

    Generated text stays for the next run. An empty folder is removed.
    """
    work = order.work
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HalfplateError(
            f"out={str(order.out)!r}: {str(work)!r} cannot be made ({error.strerror}); choose another place"
        ) from error
    with sole_user(work, order.out):
        found = [path for path in work.iterdir() if path.name != LOCK_FILE]
        states = [path for path in found if not path.name.lstrip(".").startswith(TEXT)]
        if states and not (resume or overwrite):
            raise HalfplateError(
                f"out={str(order.out)!r}: an interrupted recovery left its state in {str(work)!r}; pass --resume to continue, or --overwrite to start over"
            )
        for path in found if overwrite and not resume else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield
        finally:
            if work.exists() and {path.name for path in work.iterdir()} <= {LOCK_FILE}:
                shutil.rmtree(work, ignore_errors=True)


def _open_teacher(name: str) -> Source:
    try:
        return open_source(name)
    except HalfplateError as error:
        raise HalfplateError(str(error).replace("model=", "teacher=", 1)) from error


def _check_tokenizer(base: Path, teacher: str, tokenizer: Any) -> None:
    """Raise HalfplateError if a token has a different number in the teacher."""
    ours, theirs = load_tokenizer(base).get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        other = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise HalfplateError(
            f"teacher={teacher!r} has a different vocabulary: token {other!r} is {theirs.get(other)} in it and {ours.get(other)} in the "
            "compressed model; give the original model that it was compressed from"
        )


def _check_teacher(source: Source, student: Any, settings: Recovery, smaller: bool) -> None:
    """Raise HalfplateError if the teacher is not the original. smaller: the student may have fewer layers, be narrower, and be a Mistral
    if the teacher is a Llama."""
    wanted, found = student.config.get_text_config(), source.config.get_text_config()
    sizes = (("num_hidden_layers", "number of layers"), ("hidden_size", "width"))
    if smaller and settings.square_head and any(getattr(wanted, key) != getattr(found, key) for key, _ in sizes):
        raise HalfplateError(
            f"square_head={settings.square_head:g} compares the outputs of every layer, and the pruned model has other layers than {source.name!r}; "
            "leave it out"
        )
    same = (
        (("vocab_size", "vocabulary"),)
        if smaller
        else (("model_type", "model type"), ("vocab_size", "vocabulary"), *sizes)
    )
    for key, what in same:
        if getattr(wanted, key) != getattr(found, key):
            raise HalfplateError(
                f"teacher={source.name!r} has a different {what} ({getattr(found, key)}) than the compressed model ({getattr(wanted, key)}); "
                "give the original model that it was compressed from"
            )
    check_seq_len(student, settings.seq_len, least=2)


def _check_batch(student: Any, settings: Recovery, processes: int) -> None:
    """Check the memory for the logits of both models, their softmax and its gradient, in fp32."""
    each = 4 * torch.float32.itemsize * settings.seq_len * vocabulary_of(student)
    share = -(-settings.batch // processes)
    check_memory(
        f"batch={settings.batch} sequences of seq_len={settings.seq_len}", each * share, "batch", settings.batch
    )


def _given_windows(settings: Recovery, tokenizer: Any) -> Tensor:
    """The windows of the text for training and for validation, int64 (windows, L)."""
    windows = token_windows(tokenizer, Text(settings.text, "text"), settings.seq_len)
    if len(windows) < 2:
        raise HalfplateError(
            f"text={settings.text!r} has {len(windows)} window of seq_len={settings.seq_len}, expected at least 2; pass a longer text"
        )
    return windows


def _sampled(
    settings: Recovery, dense: Any, work: Path, teacher: str, accelerator: Accelerator, report: Report
) -> Tensor:
    """Windows that the teacher generates, int64 (windows, L), the same in every process."""
    windows = torch.empty(settings.samples, settings.seq_len, dtype=torch.int64, device="cpu")
    if accelerator.is_main_process:
        identity = {"teacher": teacher} | {name: getattr(settings, name) for name in ("samples", "seq_len", "seed")}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        file = f"{TEXT}{digest[:16]}.safetensors"
        kept = load_state(work, identity, file)
        if kept is None:
            sampled = calibration_tokens(
                "self",
                dense.model,
                dense.tokenizer,
                settings.samples,
                settings.seq_len,
                settings.seed,
                lambda done, total: report("sampling text", done, total),
                maker=native_sampling,
            )
            kept = State({"ids": sampled.ids}, {"identity": identity})
            save_state(work, kept, file)
        windows = kept.tensors["ids"]
    if accelerator.num_processes > 1:
        windows = broadcast(windows.to(accelerator.device)).cpu()
    return windows


def _held_out(windows: int) -> int:
    return max(1, min(HELD_OUT, windows // 8))


def _judged(student: Any, dense: Any, held_out: Tensor, accelerator: Accelerator) -> dict[str, float]:
    return evaluate(student, held_out, dense) if accelerator.is_main_process else {}


def _tell(report: Report, settings: Recovery, progress: Progress, done: float) -> None:
    total = settings.tokens if settings.tokens is not None else round(60 * (settings.minutes or 0))
    note = "" if progress.loss is None else f"loss {progress.loss:.4f}"
    facts = {"event": "step", "step": progress.steps, "tokens": progress.tokens, "loss": progress.loss}
    report("recovering", int(done * total), total, note, share=done, facts=facts)


def _record(base: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The record of the trained checkpoint, without entries that are no longer true, and with the recovery."""
    kept = {
        key: value for key, value in base.items() if key not in ("tensors", "versions", "format_version", "held_out")
    }
    matrices = {
        name: {key: value for key, value in matrix.items() if key != "relative_error"}
        | {"relative_error_before_recovery": matrix.get("relative_error")}
        for name, matrix in kept.get("matrices", {}).items()
    }
    return kept | {"matrices": matrices, "recoveries": [*kept.get("recoveries", []), facts]}


def _sha256(windows: Tensor) -> str:
    return hashlib.sha256(windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
