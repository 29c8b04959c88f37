"""The result of a compression: assembling it from its artifacts, and recognising a finished one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.budgets.ratios import BlockRatio
from halfplate.calibration.text import recorded_hashes, text_hashes
from halfplate.checkpoint.assemble import Finished, assemble
from halfplate.checkpoint.config import RECORD_FILE, read_record
from halfplate.checkpoint.read import read_checked_headers
from halfplate.checkpoint.stack import stack_order
from halfplate.compression.layers import Outcome, finite
from halfplate.compression.work_folder import WorkFolder, check_same
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.methods.solving import MatrixRecord
from halfplate.models.sources import Source, load_tokenizer, skeleton
from halfplate.models.streamed import StreamedModel
from halfplate.planning import Plan, foreign_packages
from halfplate.recipe import Recipe
from halfplate.recovery.block import TunedBlock
from halfplate.storage.artifact import load_artifact, save_artifact_of
from halfplate.storage.tensor_file import KINDS, sha256_of
from halfplate.version import package_version

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # element type and shape of tensors, by name
RECORDED = (
    "model",
    "statistics",
    "halfplate",
    "plugins",
)  # entries of an identity that a checkpoint records besides its recipe


@dataclass(frozen=True)
class Result:
    """A finished compression: the plan with its formats, the outcome, the protocol of the text, further facts of the record, and the result of the self-check."""

    plan: Plan
    outcome: Outcome
    calibration: dict[str, Any] | None
    told: dict[str, Any]
    check: dict[str, Any] | None = None


def identity_of(source: Source, plan: Plan, threads: int) -> dict[str, Any]:
    """Everything that determines the bytes of the result except the text: the model, each entry of the recipe, threads and versions."""
    recipe = {key: value for key, value in plan.recipe.fingerprint_json().items() if key != "version"}
    plain: dict[str, Any] = json.loads(json.dumps(recipe))
    return plain | {
        "model": source.sha256(),
        "statistics": int(plan.job.statistic),
        "threads": threads,
        "halfplate": package_version(),
        **foreign_packages(plan.recipe),
    }


def finished_result(out: Path, source: Source, plan: Plan, identity: dict[str, Any], overwrite: bool) -> Result | None:
    """The complete result in `out`; None if there is none.

    Raises HalfplateError if the result was made differently, unless it may be overwritten.
    """
    if not (out / RECORD_FILE).is_file():
        return None
    try:
        record = read_record(out)
        specs, _ = read_checked_headers(out)
    except HalfplateError:
        # A damaged result of Halfplate; `check_result_folder` decides whether it may be replaced.
        return None
    try:
        return _recorded(out, source, plan, identity, record, specs, overwrite)
    # A record is untrusted data; a record with missing entries is damaged, too.
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _recorded(
    out: Path,
    source: Source,
    plan: Plan,
    identity: dict[str, Any],
    record: dict[str, Any],
    specs: dict[str, WeightSpec],
    overwrite: bool,
) -> Result | None:
    """The result that `record` describes; None if it was made differently and may be overwritten."""
    begun = {key: value for key, value in record["recipe"].items() if key != "version"} | record["identity"]
    protocol = record["calibration"]
    try:
        check_same(begun, {key: value for key, value in identity.items() if key != "threads"}, f"{str(out)!r} was made")
        check_text(source, plan.recipe, protocol)
    except HalfplateError:
        if overwrite:
            return None
        raise
    plan = plan.without(plan.layer_specs.keys() - specs.keys())
    records = [MatrixRecord.from_json(name, record["matrices"][name]) for name in plan.specs]
    tuned = {int(layer): TunedBlock(**entry) for layer, entry in record["tuned_blocks"].items()}
    told: dict[str, Any] = {}
    if "ratios" in record:
        told["ratios"] = [BlockRatio(**ratio).to_json() for ratio in record["ratios"]]
    if "knee" in record:
        told["knee"] = dict(record["knee"])
    if "search" in record:
        told["search"] = record["search"] | {
            "trajectory": [dict(step, kl=float(step["kl"])) for step in record["search"]["trajectory"]]
        }
    check = record.get("check")
    return Result(
        plan.with_specs(specs), Outcome(records, tuned), protocol, told, None if check is None else dict(check)
    )


def check_text(source: Source, recipe: Recipe, protocol: dict[str, Any] | None) -> None:
    """Raise HalfplateError if the calibration text of a finished result, with this protocol, has changed since."""
    # Text that the model generates is the same for the same model and recipe.
    if protocol is None or recipe.sampled == recipe.samples:
        return
    numbers = recipe.samples, recipe.seq_len, recipe.seed
    found = text_hashes(recipe.calibration, skeleton(source), load_tokenizer(source), *numbers)
    before, now = (
        {"tokens" if len(found) == 1 else f"tokens of {name}": sha256 for name, sha256 in texts.items()}
        for texts in (recorded_hashes(protocol), found)
    )
    check_same(before, now, "the result was made")


def assemble_weights(
    streamed: StreamedModel,
    plan: Plan,
    work: WorkFolder,
    folder: Path,
    progress: Callable[[int, int], None],
    losses: Mapping[str, Sequence[float]],
) -> dict[str, str]:
    """Write the weight files of the checkpoint to `folder`; returns the SHA-256 of each tensor.

    losses: of the steps of matrices that have any (halfplate.compression.step_gains).
    """
    found: dict[str, Finished] = {}
    for path, plain in [
        (work.outer, streamed.outer_names),
        *((work.layer(index), streamed.block_names(index)) for index in range(len(streamed.blocks))),
    ]:
        artifact = load_artifact(path)
        if artifact is None:
            # This layer has no compressed matrices.
            _save_plain(streamed, plain, path)
            artifact = load_artifact(path)
        assert artifact is not None
        found |= {name: Finished(stored, artifact.sha256[name]) for name, stored in artifact.tensors.items()}
    further = streamed.source.further
    found |= {name: Finished(stored, sha256_of(stored)) for name, stored in further.items()}
    names = [*_names(streamed, plan), *further]
    if set(names) != found.keys():
        name = min(set(names) ^ found.keys())
        raise HalfplateError(f"{name} is missing or too many among the finished files; pass --overwrite to start over")
    stack = stack_order(plan.specs, losses)
    return assemble({name: found[name] for name in names}, folder, progress, stack=stack)


def _save_plain(streamed: StreamedModel, names: list[str], path: Path) -> None:
    """Write the uncompressed tensors in their stored type, with one in memory at a time."""
    entries = plain_entries(streamed, names)
    save_artifact_of(path, entries, plain_tensors(streamed, entries), {})


def plain_entries(streamed: StreamedModel, names: Iterable[str]) -> Entries:
    """The stored element type and the shape of the uncompressed tensors `names`."""
    dtype = streamed.source.other_dtype
    kinds = {name: KINDS[streamed.stored[name].kind] for name in names}
    return {name: (dtype if kind.is_floating_point else kind, streamed.shape(name)) for name, kind in kinds.items()}


def plain_tensors(streamed: StreamedModel, entries: Entries) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `plain_entries` in their stored type, one in memory at a time."""
    for name, (dtype, _) in entries.items():
        yield name, finite(name, streamed.read(name).to("cpu", dtype))


def _names(streamed: StreamedModel, plan: Plan) -> list[str]:
    """The tensors of the checkpoint in the order of the compressed model."""
    names: list[str] = []
    for name in streamed.model.state_dict():
        module, _, leaf = name.rpartition(".")
        if module not in plan.specs:
            names += [name] if name in streamed.stored else []
        elif leaf == "weight":
            has_bias = getattr(streamed.model.get_submodule(module), "bias", None) is not None
            names += [f"{module}.{key}" for key in CompressedLinear(plan.specs[module], has_bias, "meta").state_dict()]
    return names
