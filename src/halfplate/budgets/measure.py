"""Measuring the cost and the error of each candidate of each matrix, before a budget chooses among them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from halfplate.allocation import TARGETS, candidates, table_candidates, uneven
from halfplate.budgets.stopwatch import Stopwatch
from halfplate.budgets.store import LevelStore
from halfplate.calibration import BATCH, head_gram
from halfplate.calibration.experts import collect_layer
from halfplate.errors import HalfplateError
from halfplate.formats import Chain, CompressedLinear, WeightSpec
from halfplate.formats.sharing import share, sharing_groups
from halfplate.methods.solving import relative_error, solve_group, squared_errors
from halfplate.methods.tables import solve_table, table_statistics, uses_gram
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.linears import replace_module
from halfplate.models.sources import LoadedModel
from halfplate.planning import Plan
from halfplate.recovery.loss import divergence
from halfplate.statistics import InputStatistics, Statistic
from halfplate.telemetry.progress import Report

# All candidates are measured in every tenth layer, and only those on its Pareto front in the layers between.
FULLY_MEASURED = 10
WORTH = 0.95  # a more expensive candidate is kept if its error is below this share of the previous one's
HARM_EVERY = 5  # the harm is measured in every fifth layer and in the last one, and interpolated between
PROBE_SAMPLES = 2  # calibration sequences on which the harm of each matrix alone is measured


@dataclass(frozen=True)
class MeasuredLevel:
    """A candidate with its measurements. specs: of the matrices. cost: bytes, or seconds per token. error: relative output error."""

    specs: dict[str, WeightSpec]
    cost: float
    error: float


@dataclass(frozen=True)
class Unit:
    """A matrix, or several that share a wrapper and therefore have the same candidate.

    levels: candidates of the Pareto front, by increasing cost.
    harm: KL to the original model, nats per token, per unit of relative error if only these matrices are compressed.
    """

    names: tuple[str, ...]
    levels: tuple[MeasuredLevel, ...]
    harm: float


class LevelMeasurement:
    """One pass through the original model that solves every candidate quickly, measures it, and keeps the Pareto front.

    store: receives the solutions, under (number of the unit, number of the candidate); None discards them.
    """

    def __init__(self, loaded: LoadedModel, plan: Plan, ids: Tensor, store: LevelStore | None) -> None:
        self.model, self.plan, self.recipe, self.store = loaded.model, plan, plan.recipe, store
        self.method, self.target = plan.job.method, TARGETS[plan.recipe.target]
        self.stopwatch = Stopwatch() if plan.recipe.time_budget is not None else None
        self.dense_seconds = 0.0
        self.blockwise = BlockwiseModel(loaded.model)
        self.ids = ids.to(loaded.model.device)
        self.probe = self.blockwise.embed(self.ids[:PROBE_SAMPLES])
        self.dense = _logits(self.blockwise, 0, self.probe)
        # Candidates on the Pareto front of the last fully measured layer, by kind of matrix.
        self.worthwhile: dict[tuple[str, ...], list[WeightSpec]] = {}

    def run(self, report: Report) -> list[Unit]:
        """Measure all units, in the order of the plan."""
        specs = self.plan.layer_specs
        groups: dict[int, list[list[str]]] = defaultdict(list)
        blocks = {matrix.name: matrix.block for matrix in self.plan.matrices if matrix.block is not None}
        # Wrappers are shared in results for Halfplate alone, which ties no other matrices.
        for group in sharing_groups(specs) if self.target.sparse else self.target.tied(specs):
            groups[blocks[group[0]]].append(group)
        hidden = [self.blockwise.embed(batch) for batch in self.ids.split(BATCH)]
        limit = None if self.recipe.token_limit == "none" else self.recipe.token_limit
        self.last = max(groups)
        units: list[Unit] = []
        report("choosing levels", 0, len(specs))
        for block in range(max(groups) + 1):
            if groups[block]:
                names = [name for group in groups[block] for name in group]
                statistics, hidden = collect_layer(
                    self.blockwise,
                    block,
                    hidden,
                    names,
                    Statistic.GRAM,
                    limit,
                    self.recipe.expert_tokens == "gated",
                )
            else:
                hidden = [self.blockwise.run_block(block, batch) for batch in hidden]
            for group in groups[block]:
                units.append(self._measured(len(units), block, group, [statistics[name] for name in group]))
                report("choosing levels", sum(len(unit.names) for unit in units), len(specs))
            self.probe = self.blockwise.run_block(block, self.probe)
        units = _interpolated(units, blocks)
        free = {m.name: m.spec for m in self.plan.matrices if m.free and m.spec is not None and m.spec.same_as is None}
        if free:
            for block in range(max(groups) + 1, len(self.blockwise.blocks)):
                hidden = [self.blockwise.run_block(block, batch) for batch in hidden]
            gram = head_gram(self.blockwise, hidden)
            units += [self._measured_table(name, spec, gram) for name, spec in free.items()]
        return units

    def _measured_table(self, name: str, spec: WeightSpec, gram: Tensor) -> Unit:
        """The embedding or the head as a unit. gram: of the inputs of the head."""
        module: Any = self.model.get_submodule(name)
        tied = [head for head, other in self.plan.table_specs.items() if other.same_as == name]
        head = bool(tied) or module is self.model.get_output_embeddings()
        by_gram = head and uses_gram(self.method, spec)
        statistics = table_statistics(gram, bool(tied)) if by_gram else InputStatistics()
        weight, levels = module.weight.detach().float(), []
        harm = 0.0
        for level in table_candidates(spec, self.recipe.choose, self.target):
            chain, record = solve_table(name, weight, self.method.quick(), statistics, level)
            specs = {name: level} | {other: replace(level, same_as=name) for other in tied}
            levels.append(MeasuredLevel(specs, float(sum(map(self._nbytes, specs.values()))), record.relative_error))
            if (
                not harm and record.relative_error > 0
            ):  # of the cheapest: the least of them is hardly more than rounding
                harm = self._table_harm(module, chain.dense()) / record.relative_error
        return Unit((name, *tied), tuple(_front(levels)), harm)

    def _table_harm(self, module: Any, table: Tensor) -> float:
        """KL to the original model, nats per token, with this table alone replaced."""
        before = module.weight.data
        try:
            module.weight.data = table.to(before.dtype)
            logits = _logits(self.blockwise, 0, self.blockwise.embed(self.ids[:PROBE_SAMPLES]))
            return float(divergence(logits.flatten(0, 1), self.dense.flatten(0, 1)))
        finally:
            module.weight.data = before

    def _nbytes(self, spec: WeightSpec) -> int:
        return spec.nbytes if self.plan.limit is None else self.plan.limit.cost(spec)

    def _measured(self, number: int, block: int, names: list[str], statistics: Sequence[InputStatistics]) -> Unit:
        linears = [cast(nn.Linear, self.model.get_submodule(name)) for name in names]
        if self.stopwatch is not None:
            self.dense_seconds += sum(self.stopwatch.dense(linear) for linear in linears)
        planned = {name: self.plan.specs[name] for name in names}
        first, kind = planned[names[0]], _kind(names)
        tried: dict[tuple[object, ...], tuple[MeasuredLevel, list[Chain]]] = {}

        def measure(offered: Sequence[WeightSpec]) -> None:
            for level in offered:
                specs = None if _key(level) in tried else at_level(planned, level)
                # If the target holds none of them, all stay as they are.
                if specs is not None and (level == first or all(map(self.target.holds, specs.values()))):
                    tried[_key(level)] = self._tried(linears, specs, statistics)

        measure([first])
        level, chains = tried[_key(first)]
        harm = 0.0
        if level.error > 0:
            asked = block % HARM_EVERY == 0 or block == self.last or kind not in self.worthwhile
            harm = self._harm(block, names, linears, chains) / level.error if asked else math.nan
        if block % FULLY_MEASURED and kind in self.worthwhile:
            measure(self.worthwhile[kind])
        else:
            measure(candidates(first, self.method, self.recipe.choose, self.target))
            for level in _front([found for found, _ in tried.values()]):
                measure(uneven(level.specs[names[0]], self.method, self.recipe.choose))
        front = _front([found for found, _ in tried.values()])
        if not block % FULLY_MEASURED:
            self.worthwhile[kind] = [level.specs[names[0]] for level in front]
        if self.store is not None:
            for index, level in enumerate(front):
                self.store.put((number, index), tried[_key(level.specs[names[0]])][1])
        return Unit(tuple(names), tuple(front), harm)

    def _tried(
        self, linears: list[nn.Linear], specs: dict[str, WeightSpec], statistics: Sequence[InputStatistics]
    ) -> tuple[MeasuredLevel, list[Chain]]:
        weights, each = [linear.weight.detach().float() for linear in linears], list(specs.items())
        if len(each) == 1 or any(spec.in_shared for spec in specs.values()):
            chains, _ = solve_group(weights, self.method.quick(), statistics[0], list(specs.values()), each[0][0])
            error, _ = relative_error(torch.cat(weights), torch.cat([chain.dense() for chain in chains]), statistics[0])
        else:
            chains = [
                solve_group([weight], self.method.quick(), own, [spec], name)[0][0]
                for (name, spec), weight, own in zip(each, weights, statistics, strict=True)
            ]
            error = _error_together(weights, chains, statistics)
        if self.stopwatch is None:
            cost = float(sum(map(self._nbytes, specs.values())))
        else:
            cost = sum(self.stopwatch.compressed(linear) for linear in compressed_linears(linears, chains))
        return MeasuredLevel(specs, cost, error), chains

    def _harm(self, block: int, names: list[str], linears: list[nn.Linear], chains: list[Chain]) -> float:
        """KL to the original model, nats per token, with these matrices alone compressed."""
        try:
            for name, compressed in zip(names, compressed_linears(linears, chains), strict=True):
                replace_module(self.model, name, compressed)
            logits = _logits(self.blockwise, block, self.probe)
            return float(divergence(logits.flatten(0, 1), self.dense.flatten(0, 1)))
        finally:
            for name, linear in zip(names, linears, strict=True):
                self.model.set_submodule(name, linear)


def _interpolated(units: list[Unit], blocks: Mapping[str, int]) -> list[Unit]:
    """The units with the harm of those that were not measured (NaN): between the nearest layers with the same matrices, in logarithms."""
    known: dict[tuple[str, ...], list[tuple[int, float]]] = defaultdict(list)
    for unit in units:
        if unit.harm > 0:
            known[_kind(unit.names)].append((blocks[unit.names[0]], math.log(unit.harm)))
    found = []
    for unit in units:
        if math.isnan(unit.harm):
            points = known[_kind(unit.names)]
            at, logarithms = [block for block, _ in points], [logarithm for _, logarithm in points]
            harm = math.exp(np.interp(blocks[unit.names[0]], at, logarithms)) if points else 0.0
            unit = replace(unit, harm=harm)
        found.append(unit)
    return found


def _kind(names: Sequence[str]) -> tuple[str, ...]:
    """What the same matrices of other layers have in common."""
    return tuple(name.rpartition(".")[2] for name in names)


def _error_together(weights: Sequence[Tensor], chains: Sequence[Chain], statistics: Sequence[InputStatistics]) -> float:
    """The relative output error of matrices that have inputs of their own."""
    error = whole = 0.0
    for weight, chain, own in zip(weights, chains, statistics, strict=True):
        lost, all_, scale, _ = squared_errors(weight, chain.dense(), own)
        error, whole = error + lost * scale, whole + all_ * scale
    return error / whole if whole > 0 else 0.0


def _key(spec: WeightSpec) -> tuple[object, ...]:
    """The settings that matrices of different shapes can have in common."""
    return spec.pattern, spec.core_dtype, spec.out_block, spec.in_block, spec.group, spec.rank, spec.parts


def at_level(planned: Mapping[str, WeightSpec], level: WeightSpec) -> dict[str, WeightSpec] | None:
    """The specifications `planned` of a unit with the pattern, core, blocks and parts of candidate `level`; None if these are invalid for one."""
    try:
        specs = {
            name: replace(
                spec.alone,
                pattern=level.pattern,
                core_dtype=level.core_dtype,
                out_block=level.out_block,
                in_block=level.in_block,
                group=level.group,
                rank=level.rank,
                parts=level.parts,
            )
            for name, spec in planned.items()
        }
    except HalfplateError:
        return None
    return share(specs, [list(planned)])


def compressed_linears(linears: Sequence[nn.Linear], chains: Sequence[Chain]) -> list[CompressedLinear]:
    """Modules of `chains` that replace `linears`; those that share a wrapper are connected to the first."""
    modules = [
        CompressedLinear.from_weight(chain, chain.spec, linear.bias)
        for linear, chain in zip(linears, chains, strict=True)
    ]
    for module in modules:
        module.lend(modules[0] if module.spec.in_shared is not None else None)
    return modules


def _front(levels: Sequence[MeasuredLevel]) -> list[MeasuredLevel]:
    """The Pareto front of cost and error, cheapest first, without candidates that gain almost nothing."""
    front: list[MeasuredLevel] = []
    for level in sorted(levels, key=lambda level: (level.cost, level.error)):
        if not front or level.error < WORTH * front[-1].error:
            front.append(level)
    return front


def _logits(blockwise: BlockwiseModel, block: int, inputs: BlockInputs) -> Tensor:
    """Logits (samples, L, vocabulary) from the inputs of `block`."""
    for index in range(block, len(blockwise.blocks)):
        inputs = blockwise.run_block(index, inputs)
    return blockwise.finish(inputs)
