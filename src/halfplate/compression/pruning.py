"""Writing a smaller model as an ordinary folder: the transforms of a recipe alone, without compressing a matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch

from halfplate.arguments import path_text
from halfplate.calibration import CalibrationTokens
from halfplate.calibration.documents import check_source
from halfplate.calibration.mixture import parts_of
from halfplate.calibration.text import check_seq_len, check_tokens_fit
from halfplate.checkpoint.companions import copy_companions
from halfplate.checkpoint.config import read_record
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.output import check_place, check_result_folder
from halfplate.checkpoint.weights import read_back, read_headers
from halfplate.checkpoint.write import write_configuration, write_record
from halfplate.compression.preparation import check_weights, fixed_threads, prepared_tokens
from halfplate.compression.published_form import PublishedForm
from halfplate.compression.result import check_text
from halfplate.compression.self_check import check_tokens, original_logits
from halfplate.compression.transforming import transformed
from halfplate.compression.work_folder import WorkFolder, check_same
from halfplate.defaults import plain_defaults
from halfplate.device import check_device
from halfplate.errors import HalfplateError
from halfplate.evaluation.perplexity import compare
from halfplate.headroom import available_memory, memory, spoken
from halfplate.job import Job
from halfplate.limits import check_threads
from halfplate.models.licence import origin
from halfplate.models.sources import Source, load_tokenizer, open_source, skeleton
from halfplate.models.streamed import StreamedModel
from halfplate.planning import foreign_packages
from halfplate.planning.room import free_for
from halfplate.planning.transforming import TransformPlan, plan_transforms
from halfplate.recipe import Recipe
from halfplate.registry import unknown
from halfplate.storage.shards import MAX_SHARD_NBYTES, write_shards
from halfplate.storage.tensor_file import TensorFileWriter
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.log import run_log
from halfplate.telemetry.progress import Report, silent
from halfplate.version import package_version

METHOD = "modegpt"


class PruneFields(TypedDict, total=False):
    """The fields of Recipe that matter without a compression, as keyword arguments."""

    transforms: Sequence[str]
    calibration: str | Sequence[str]
    samples: int
    seq_len: int
    seed: int
    device: str
    precision: Literal["auto", "bf16", "fp32"]
    threads: int | None


@dataclass(frozen=True)
class _Order:
    """The checked arguments: the model, its plan, and where the result goes."""

    source: Source
    recipe: Recipe
    steps: tuple[TransformPlan, ...]
    out: Path
    identity: dict[str, Any]
    work: WorkFolder
    overwrite: bool
    check: bool


@plain_defaults()
def prune(
    model: str | Path,
    out: str | Path,
    keep: float,
    overwrite: bool = False,
    resume: bool = False,
    report: Report = silent,
    check: bool = True,
    **options: Unpack[PruneFields],
) -> dict[str, Any]:
    """Write a smaller model with at most `keep` times the parameters of `model` to the folder `out`, and return its figures.

    The result is an ordinary model of the same architecture and element type, which transformers loads without Halfplate.

    - resume: continue an interrupted run of the same command, with the same result
    - report: called at every step (`halfplate.telemetry.progress.Report`)
    - check: measure the KL to the original on a built-in text before `out` is written
    - options: fields of Recipe: transforms (default modegpt), calibration, samples, seq_len, seed, device, precision, threads

    Raises HalfplateError, without writing anything, on bad input and if memory or disk space are too small.

    ```pycon
    >>> summary = halfplate.prune("tiny", "tiny-narrow", keep=0.9, transforms=["magnitude-structured"])
    >>> summary["parameters"] <= 0.9 * summary["dense_parameters"]
    True

    ```
    """
    for name in options:
        if name not in PruneFields.__annotations__:
            raise unknown("option", name, list(PruneFields.__annotations__))
    fields: Any = {"transforms": (METHOD,)} | options | {"keep": keep}
    recipe = Recipe.of(**fields)
    model, out = path_text("model", model), Path(path_text("out", out))
    check_threads(recipe.threads)
    source = open_source(model)
    check_device(recipe.device)
    identity = _identity(source, recipe)
    finished = _finished(out, source, recipe, identity, overwrite) if resume else None
    if finished is not None:
        return finished | {"seconds": {"total": 0.0}}
    check_result_folder(out, overwrite, source.path)
    _, steps = plan_transforms(source, recipe)
    _check_text(source, recipe)
    _check_room(source, steps, out)
    order = _Order(source, recipe, steps, out, identity, WorkFolder(check_place(out)), overwrite, check)
    threads = fixed_threads(recipe, order.work, resume)
    torch.set_num_threads(threads)
    with order.work.opened(identity | {"threads": threads}, resume, overwrite), run_log(out, report, resume) as told:
        return _carry_out(order, told)


def _finished(
    out: Path, source: Source, recipe: Recipe, identity: dict[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """The summary of the complete result in `out`; None if there is none.

    Raises HalfplateError if the result was made differently, unless it may be overwritten.
    """
    try:
        record = read_record(out)
        begun, found = record["identity"], _summary(out, source, record)
    except (HalfplateError, KeyError):
        return None
    try:
        check_same(begun, identity, f"{str(out)!r} was made")
        check_text(source, recipe, record["calibration"])
    except HalfplateError:
        if overwrite:
            return None
        raise
    return found


def _summary(out: Path, source: Source, record: Mapping[str, Any]) -> dict[str, Any]:
    nbytes = sum(tensor.nbytes for tensor in read_headers(out).values())
    sizes = {name: record["pruned"][name] for name in ("parameters", "dense_parameters")}
    told = {name: record[name] for name in ("model", "pruned", "calibration", "check") if name in record}
    return {"out": str(out), "nbytes": nbytes, "source_nbytes": source.nbytes, **sizes, **told}


def _identity(source: Source, recipe: Recipe) -> dict[str, Any]:
    """Everything that determines the bytes of the result except the text and the number of threads."""
    names = {"keep", *PruneFields.__annotations__} - {"threads"}
    fields = {name: value for name, value in recipe.to_json().items() if name in names}
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain | {"model": source.sha256(), "halfplate": package_version(), **foreign_packages(recipe)}


def _check_text(source: Source, recipe: Recipe) -> None:
    """Raise HalfplateError if a transform needs a text that cannot be read."""
    if Job(recipe).measures:
        for part in parts_of(recipe.calibration):
            check_source(part.source)
        check_seq_len(skeleton(source), recipe.seq_len, least=2)
        check_tokens_fit("samples", recipe.samples, recipe.seq_len)


def _check_room(source: Source, steps: tuple[TransformPlan, ...], out: Path) -> None:
    """Raise HalfplateError if memory or disk space are too small."""
    need, available = max(step.memory for step in steps), available_memory()
    held = memory("VmRSS") or 0
    if available is not None and held + need > available:
        raise HalfplateError(
            f"memory: the transforms need {spoken(held + need)}, this process can use {spoken(available)}; use fewer --seq-len, or a machine "
            "with more memory"
        )
    disk, free = sum(step.disk for step in steps) + source.nbytes, free_for(out)
    if free is not None and disk > free:
        raise HalfplateError(
            f"out={str(out)!r}: {spoken(disk)} of disk space needed, but only {spoken(free)} free; free some space, or choose an OUT on another disk"
        )


def _carry_out(order: _Order, report: Report) -> dict[str, Any]:
    source, recipe, work, clock = order.source, order.recipe, order.work, Clock()
    asked = {"event": "plan", "verb": "prune", "model": source.name, "out": str(order.out)}
    report("reading", 0, 1, facts=asked | {"transforms": [step.to_json() for step in order.steps]})
    tokens: list[CalibrationTokens] = []

    def tokens_of(streamed: StreamedModel) -> CalibrationTokens:
        with clock("calibration text"):
            tokens.append(prepared_tokens(streamed, recipe, work, report))
        return tokens[0]

    with clock("transforms"):
        original, result = transformed(source, order.steps, recipe, work, report, tokens_of)
    streamed = StreamedModel(result)
    check_weights(streamed, work, clock, report)
    sizes = {"parameters": _parameters(streamed), "dense_parameters": _parameters(StreamedModel(original))}
    told = "; ".join(step.told for step in order.steps if step.told)
    with clock("writing"), new_folder(order.out, order.overwrite, work.result) as folder:
        checksums = _write(streamed, source, folder)
        read_back(folder, checksums)
        record: dict[str, Any] = {
            "model": source.name,
            "pruned": {"transforms": list(recipe.transforms), "keep": recipe.keep, "told": told, **sizes},
            "calibration": tokens[0].protocol() if tokens else None,
            "identity": order.identity,
            **origin(source),
        }
        if order.check:
            report("checking the result", 0, 1)
            with clock("checking"):
                record["check"] = _checked(original, folder, recipe.device)
            report("checking the result", 1, 1)
        write_record(folder, record)
    report("finishing", 1, 1, facts={"event": "end", "seconds": clock.seconds})
    return _summary(order.out, source, record) | {"seconds": clock.seconds}


def _write(streamed: StreamedModel, source: Source, folder: Path) -> dict[str, str]:
    """Write all files of the model except its record; returns the SHA-256 of each tensor."""
    form = PublishedForm(streamed)

    def write(file: TensorFileWriter, name: str) -> str:
        return file.write(name, form.tensor(name))

    checksums = write_shards(form.entries, folder, MAX_SHARD_NBYTES, write)
    write_configuration(streamed.model, load_tokenizer(source), folder, source.other_dtype, None)
    copy_companions(source.path, folder)
    return checksums


def _parameters(streamed: StreamedModel) -> int:
    return sum(int(torch.Size(streamed.shape(name)).numel()) for name in streamed.stored)


def _checked(original: Source, folder: Path, device: str) -> dict[str, Any]:
    """The figures of the written model on the built-in text, as the self-check of a compression measures them."""
    written = StreamedModel(open_source(str(folder)), device)
    ids = check_tokens(load_tokenizer(written.source), written.model).to(written.device)
    found, expected = original_logits(written, ids), original_logits(StreamedModel(original, device), ids)
    measures = compare(found[:, :-1].flatten(0, 1), expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten().cpu())
    return {name: float(f"{value:.6g}") for name, value in measures.items()} | {
        "tokens": ids.shape[1] - 1,
        "text": "built-in",
    }
