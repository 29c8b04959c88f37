"""Compressing the embedding and the output layer, before the layers, which then receive the stored embedding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from halfplate.calibration import BATCH, CalibrationTokens, head_gram
from halfplate.compression.result import plain_entries, plain_tensors
from halfplate.compression.tasks import facts_of, records_in
from halfplate.compression.work_folder import WorkFolder
from halfplate.formats import Chain, WeightSpec
from halfplate.methods.solving import MatrixRecord
from halfplate.methods.tables import solve_table, table_statistics, uses_gram
from halfplate.models.streamed import StreamedModel
from halfplate.planning import Plan
from halfplate.planning.memory import TABLE_TOKENS
from halfplate.statistics import InputStatistics
from halfplate.storage.artifact import Artifact, load_artifact, remove_artifact, save_artifact_of
from halfplate.storage.tensor_file import read_tensor
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.progress import Report


def solve_tables(
    streamed: StreamedModel,
    plan: Plan,
    tokens: CalibrationTokens | None,
    work: WorkFolder,
    report: Report,
    clock: Clock,
) -> list[MatrixRecord]:
    """Solve the tables of the plan, write everything outside the layers to an artifact, and let `streamed` read tables from it.

    A head, tied or not, is solved by the recipe's method for the Gram matrix of the original model's final hidden states, if that
    method uses Gram matrices and supports unpruned cores. Other tables are rounded to nearest. An intact artifact is kept.
    Returns a record for each table.
    """
    if not plan.table_specs:
        return []
    part = load_artifact(work.outer)
    wanted = {name: spec.to_json() for name, spec in plan.table_specs.items()}
    if part is None or part.facts.get("specs") != wanted or part.damaged() is not None:
        remove_artifact(work.outer)
        with clock("tables"):
            _solve(streamed, plan, tokens, work, report)
        part = load_artifact(work.outer)
        assert part is not None, "it has just been written"
    streamed.decoded |= {
        f"{name}.weight": _decoding(part, name, spec) for name, spec in plan.table_specs.items() if spec.same_as is None
    }
    return records_in(part)


def _decoding(part: Artifact, name: str, spec: WeightSpec) -> Callable[[], Tensor]:
    def decode() -> Tensor:
        stored = {key: read_tensor(part.tensors[f"{name}.{key}"]) for key in spec.layout()}
        return Chain.from_tensors(spec, stored).dense()

    return decode


def _solve(
    streamed: StreamedModel, plan: Plan, tokens: CalibrationTokens | None, work: WorkFolder, report: Report
) -> None:
    specs, method = plan.table_specs, plan.job.method
    heads = {spec.same_as or name for name, spec in specs.items() if _is_head(streamed, name)}
    by_gram = {name for name in heads if tokens is not None and uses_gram(method, specs[name])}
    gram = _final_gram(streamed, cast(CalibrationTokens, tokens).ids, report) if by_gram else None
    records: dict[str, MatrixRecord] = {}
    solved: dict[str, Chain] = {}
    own = {name: spec for name, spec in specs.items() if spec.same_as is None}
    for number, (name, spec) in enumerate(own.items()):
        report("embedding and head", number, len(own))
        tied = any(other.same_as == name for other in specs.values())
        statistics = table_statistics(gram, tied) if gram is not None and name in by_gram else InputStatistics()
        solved[name], records[name] = solve_table(name, streamed.read(f"{name}.weight"), method, statistics, spec)
    for name, spec in specs.items():
        if spec.same_as is not None:
            records[name] = MatrixRecord(**vars(records[spec.same_as]) | {"name": name})
    report("embedding and head", len(own), len(own))
    stored = {
        f"{name}.{key}": tensor.cpu() for name, table in solved.items() for key, tensor in table.tensors().items()
    }
    replaced = {f"{name}.weight" for name in own}
    plain = plain_entries(streamed, (name for name in streamed.outer_names if name not in replaced))
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} | plain
    tensors = chain(stored.items(), plain_tensors(streamed, plain))
    save_artifact_of(work.outer, entries, tensors, facts_of([records[name] for name in specs], specs))


def _is_head(streamed: StreamedModel, name: str) -> bool:
    return streamed.model.get_submodule(name) is streamed.model.get_output_embeddings()


@torch.no_grad()
def _final_gram(streamed: StreamedModel, ids: Tensor, report: Report) -> Tensor:
    """The Gram matrix, fp64 (hidden, hidden), of the head's inputs in the original model, over at most TABLE_TOKENS tokens."""
    batches = ids[: max(1, TABLE_TOKENS // ids.shape[1])].to(streamed.device).split(BATCH)
    with streamed.outer(head=False):
        states = [streamed.embed(batch) for batch in batches]
        for index in range(len(streamed.blocks)):
            report("embedding and head: final hidden states", index, len(streamed.blocks))
            streamed.load_block(index)
            try:
                states = [streamed.blockwise.run_block(index, state) for state in states]
            finally:
                streamed.free_block(index)
        return head_gram(streamed.blockwise, states)
