"""Choosing the level of every matrix under one budget, from measured errors, measured harm and measured times."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn

from halfplate.allocation import Level, allocate, candidates
from halfplate.calibration import BATCH, CalibrationTokens, collect_block
from halfplate.errors import HalfplateError
from halfplate.execution.clock import Clock
from halfplate.execution.matrix import relative_error
from halfplate.execution.progress import Report
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.kernels.linear import unsupported
from halfplate.methods.base import Method
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.linears import replace_linear
from halfplate.models.sources import LoadedModel
from halfplate.pattern import DENSE
from halfplate.planning import MatrixPlan, Plan
from halfplate.recovery.loss import divergence
from halfplate.runtime.linear import PackedLinear
from halfplate.statistics import InputStatistics, Statistic

# Every candidate is measured in one block of so many; in between only those that were worth their cost there.
FULLY_MEASURED = 10
PROBE_SAMPLES = 2  # calibration sequences on which the harm of each matrix alone is measured
COLD_BYTES = 96 * 2**20  # copies of a matrix that are read in turn, so that each comes from memory
MOST_COPIES = 200
TIMINGS = 5


@dataclass(frozen=True)
class Measured:
    """One candidate for one matrix. cost: bytes, or seconds a token. error: of the outputs, relative."""

    spec: WeightSpec
    cost: float
    error: float


@dataclass(frozen=True)
class MeasuredMatrix:
    """All candidates for one matrix. harm: KL to the dense model, nats a token, for each unit of relative error in this matrix alone."""

    name: str
    levels: tuple[Measured, ...]
    harm: float


@torch.no_grad()
def allocate_plan(loaded: LoadedModel, plan: Plan, tokens: CalibrationTokens, report: Report, clock: Clock) -> Plan:
    """The plan with the level of every matrix chosen, so that the expected KL is least within the budget of its recipe.

    Errors are measured by a quick solve of every candidate on the inputs of the dense model; the KL is taken to grow in
    proportion with the error of each matrix (it is quadratic in small changes) and to add up. After ROCKET (knapsack over
    measured errors), with the model's own KL in place of a proxy. Raises HalfplateError where the budget cannot be met.
    """
    with clock("choosing levels"):
        measured, dense_seconds = _measure(loaded, plan, tokens, report)
        recipe = plan.recipe
        if recipe.time_budget is not None:
            budget = recipe.time_budget * dense_seconds
        else:
            assert recipe.budget is not None
            budget = recipe.budget * plan.dense_nbytes
        options = [[Level(level.cost, matrix.harm * level.error) for level in matrix.levels] for matrix in measured]
        try:
            picked = allocate(options, budget)
        except HalfplateError:
            least = sum(min(level.cost for level in levels) for levels in options)
            raise HalfplateError(_unmet("time_budget", recipe.time_budget or 0, least / dense_seconds)) from None
        chosen = {matrix.name: matrix.levels[index].spec for matrix, index in zip(measured, picked, strict=True)}
    return replace(plan, matrices=tuple(_with_level(matrix, chosen) for matrix in plan.matrices))


def _unmet(name: str, value: float, least: float) -> str:
    return f"{name}={value:g} cannot be met: the least is {least:.4f}; raise it, or let --choose leave more free"


def _with_level(matrix: MatrixPlan, chosen: dict[str, WeightSpec]) -> MatrixPlan:
    return replace(matrix, spec=chosen[matrix.name]) if matrix.name in chosen else matrix


def _measure(
    loaded: LoadedModel, plan: Plan, tokens: CalibrationTokens, report: Report
) -> tuple[list[MeasuredMatrix], float]:
    """All candidates of all planned matrices, in the order of the plan, and the seconds a token of the dense ones in bf16."""
    recipe = plan.recipe
    method = recipe.create_method()
    clockwork = _Stopwatch() if recipe.time_budget is not None else None
    blockwise = BlockwiseModel(loaded.model)
    ids = tokens.ids.to(loaded.model.device)
    hidden = [blockwise.embed(batch) for batch in ids.split(BATCH)]
    probe = blockwise.embed(ids[:PROBE_SAMPLES])
    dense = _logits(blockwise, 0, probe)
    names: dict[int, list[str]] = defaultdict(list)
    for matrix in plan.matrices:
        if matrix.spec is not None and matrix.block is not None:
            names[matrix.block].append(matrix.name)
    done: dict[str, MeasuredMatrix] = {}
    worthwhile: dict[str, set[tuple[object, ...]]] = {}
    dense_seconds = 0.0
    limit = None if recipe.token_limit == "none" else recipe.token_limit
    report("choosing levels", 0, len(plan.specs))
    for block in range(max(names) + 1):
        if names[block]:
            statistics, hidden = collect_block(blockwise, block, hidden, names[block], Statistic.GRAM, limit)
        else:
            hidden = [blockwise.run_block(block, batch) for batch in hidden]
        for name in names[block]:
            linear = cast(nn.Linear, loaded.model.get_submodule(name))
            if clockwork is not None:
                dense_seconds += clockwork.dense(linear)
            levels = []
            harm = 0.0
            offered = candidates(plan.specs[name], method, recipe.choose)
            kind = name.rpartition(".")[2]
            if block % FULLY_MEASURED and kind in worthwhile:
                offered = [spec for spec in offered if spec == plan.specs[name] or _level(spec) in worthwhile[kind]]
            for spec in offered:
                compressed, error = _tried(linear, statistics[name], spec, method.quick(), name)
                cost = float(spec.nbytes) if clockwork is None else clockwork.compressed(compressed)
                levels.append(Measured(spec, cost, error))
                if spec == plan.specs[name] and error > 0:
                    harm = _harm(loaded, blockwise, block, probe, dense, name, compressed) / error
            if not block % FULLY_MEASURED:
                worthwhile[kind] = {_level(level.spec) for level in _front(levels)}
            done[name] = MeasuredMatrix(name, tuple(levels), harm)
            report("choosing levels", len(done), len(plan.specs))
        probe = blockwise.run_block(block, probe)
    return [done[name] for name in plan.specs], dense_seconds


def _level(spec: WeightSpec) -> tuple[object, ...]:
    """What matrices of different shapes may have in common."""
    return spec.pattern, spec.core_dtype, spec.out_block, spec.in_block


def _front(levels: list[Measured]) -> list[Measured]:
    """The levels that no other beats in cost and error, and the cheapest."""
    front: list[Measured] = []
    for level in sorted(levels, key=lambda level: (level.cost, level.error)):
        if not front or level.error < front[-1].error:
            front.append(level)
    return front


def _tried(
    linear: nn.Linear, statistics: InputStatistics, spec: WeightSpec, method: Method, name: str
) -> tuple[CompressedLinear, float]:
    weight = linear.weight.detach().float()
    try:
        solution = method.compress(weight, statistics, spec)
    except HalfplateError as refusal:
        raise HalfplateError(f"{name}: {refusal}") from None
    error, _ = relative_error(weight, solution.weight.dense(), statistics)
    return CompressedLinear.from_weight(solution.weight, spec, linear.bias), error


def _harm(
    loaded: LoadedModel,
    blockwise: BlockwiseModel,
    block: int,
    probe: BlockInputs,
    dense: Tensor,
    name: str,
    compressed: CompressedLinear,
) -> float:
    """KL to the dense model, nats a token, with this one matrix compressed."""
    linear = loaded.model.get_submodule(name)
    replace_linear(loaded.model, name, compressed)
    try:
        return float(divergence(_logits(blockwise, block, probe).flatten(0, 1), dense.flatten(0, 1)))
    finally:
        loaded.model.set_submodule(name, linear)


def _logits(blockwise: BlockwiseModel, block: int, inputs: BlockInputs) -> Tensor:
    """Logits (samples, L, vocabulary) from the inputs of `block`."""
    for index in range(block, len(blockwise.blocks)):
        inputs = blockwise.run_block(index, inputs)
    return blockwise.finish(inputs)


class _Stopwatch:
    """Seconds that a linear takes for one token, read from memory; one measurement serves all of one specification."""

    def __init__(self) -> None:
        self._known: dict[WeightSpec, float] = {}

    def dense(self, linear: nn.Linear) -> float:
        spec = WeightSpec(linear.out_features, linear.in_features, DENSE, "bf16")
        packed = None if unsupported(spec) else PackedLinear.of_dense(linear, "bf16")
        return self._time(spec, linear if packed is None else packed)

    def compressed(self, linear: CompressedLinear) -> float:
        packed = None if unsupported(linear.spec) else PackedLinear.of_compressed(linear)
        return self._time(linear.spec, linear if packed is None else packed)

    def _time(self, spec: WeightSpec, linear: nn.Module) -> float:
        if spec not in self._known:
            nbytes = sum(tensor.nbytes for tensor in linear.state_dict(keep_vars=True).values())
            copies = [
                copy.deepcopy(linear) for _ in range(max(2, COLD_BYTES // max(nbytes, COLD_BYTES // MOST_COPIES)))
            ]
            x = torch.randn(1, spec.d_in, device=next(iter(linear.state_dict().values())).device)
            rounds = []
            for _ in range(TIMINGS):
                start = time.perf_counter()
                for other in copies:
                    other(x)
                rounds.append((time.perf_counter() - start) / len(copies))
            self._known[spec] = median(rounds)
        return self._known[spec]
