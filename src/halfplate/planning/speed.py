"""Estimating the time of a compression: operations divided by the speed of this machine, which is measured in a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.allocation import TARGETS, candidates
from halfplate.calibration.collect import BATCH
from halfplate.calibration.experts import SAMPLED
from halfplate.calibration.self_text import sequences_at_once
from halfplate.errors import HalfplateError
from halfplate.formats.spec import WeightSpec
from halfplate.job import Job
from halfplate.methods.base import Method
from halfplate.models.sources import Source
from halfplate.planning.memory import sampling_room
from halfplate.planning.sizes import ModelSizes
from halfplate.precision import products
from halfplate.recipe import Recipe
from halfplate.runtime.prepare import bf16_kernels
from halfplate.statistics import InputStatistics, Statistic
from halfplate.storage.tensor_file import DamagedFile, read_tensor

WORTH_FLOPS = 1e12  # estimated length of a run from which a few seconds of measuring do not matter
LONGEST_SIDE = 512  # longest side of a matrix that is solved for measuring
LONGEST_READ = 64_000_000  # largest tensor in bytes that is read for measuring
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
SHAPES = 3  # number of matrices that are solved for measuring
LEAST_SECONDS = 0.05  # seconds for which a product is repeated
SMALL_OPERATIONS = 100  # values of a layer and token, where the time is that of the calls


@dataclass(frozen=True)
class Speed:
    """Rates of this machine per second, measured by `measure_speed`.

    solving: floating-point operations of the method.
    products: floating-point operations of matrix products with many tokens.
    sampling: weights that are multiplied with a few parallel sequences.
    reading: bytes of weight files.
    call: seconds for the calls of one layer.
    """

    solving: float
    products: float
    sampling: float
    reading: float
    call: float


def measure_speed(source: Source, sizes: ModelSizes, specs: Sequence[WeightSpec], job: Job) -> Speed:
    """Time the method on a few small matrices like those of the plan, matrix products, and reading one tensor."""
    recipe = job.recipe
    with _threads(recipe.threads), torch.no_grad():
        return Speed(
            _solving(job.method, specs, recipe.device),
            _products(sizes, recipe),
            _sampling(sizes, recipe),
            _reading(source),
            _call(),
        )


def seconds_of(
    sizes: ModelSizes,
    specs: Sequence[WeightSpec],
    source_nbytes: int,
    job: Job,
    speed: Speed,
) -> dict[str, float]:
    """Seconds of each phase in one process."""
    recipe, method = job.recipe, job.method
    seconds = {"reading": source_nbytes / speed.reading}
    solving = sum(solving_flops(job, spec) for spec in specs)
    if job.runs_text:
        if recipe.sampled:
            seconds["calibration text"] = _sampling_seconds(sizes, source_nbytes, recipe, speed)
        seconds["statistics"] = statistics_flops(sizes, job) / speed.products
    seconds["solving"] = solving / speed.solving
    if recipe.budgeted:
        quick = method.quick()
        tried = (level for spec in specs for level in candidates(spec, method, recipe.choose, TARGETS[recipe.target]))
        seconds["choosing levels"] = sum(quick.flops(level) for level in tried) / speed.solving
    if recipe.tune_block:
        tokens = recipe.tune_block * 2 * recipe.seq_len
        seconds["tuning"] = 6.0 * sum(sizes.blocks) * tokens / speed.products
    # Artifacts are written, read and written again, each time with checksums.
    seconds["writing"] = 3 * sum(spec.nbytes for spec in specs) / speed.reading
    return seconds


def solving_flops(job: Job, spec: WeightSpec) -> float:
    """Operations of one matrix: the method, the correction towards the original inputs, and the error of the result."""
    flops = job.method.flops(spec)
    product = 2.0 * spec.d_out * spec.d_in**2
    if job.statistic >= Statistic.GRAM:
        flops += 2 * product
    if job.corrects:
        flops += 2 * product + spec.d_in**3 / 3
    return flops


def statistics_flops(sizes: ModelSizes, job: Job) -> float:
    """Operations for running the text through all layers, once per stage and once in the original model, and for its second moments."""
    recipe, streams = job.recipe, job.streams
    tokens, blocks = recipe.samples * recipe.seq_len, len(sizes.blocks)
    # A run for the inputs of a stage ends there, halfway on average; with inputs of the original, one run collects all.
    runs = 2.0 if recipe.inputs == "dense" else streams + len(sizes.stages) / 2
    experts = sizes.experts
    idle = 0 if experts is None else experts.layers * (experts.experts - experts.chosen) * experts.values
    through = 2.0 * max(sum(sizes.blocks) - idle, 0) + 4.0 * recipe.seq_len * sizes.hidden * blocks
    moments = sum(2.0 * width**2 for width in sizes.stages) * blocks if job.statistic >= Statistic.GRAM else 0.0
    kinds = 2 if job.corrects else 1
    return tokens * (runs * through + moments * kinds) + kinds * _expert_flops(sizes, job)


def _expert_flops(sizes: ModelSizes, job: Job) -> float:
    """Operations for the second moments of the inputs of all experts, and for running each one on a sample of all tokens."""
    experts, tokens = sizes.experts, job.recipe.samples * job.recipe.seq_len
    if experts is None or job.statistic < Statistic.GRAM:
        return 0.0
    routed = tokens * (1 + experts.chosen)
    sampled = experts.experts * min(SAMPLED * experts.inner, tokens)
    down = (tokens * experts.chosen + sampled) * (2.0 * experts.inner**2 + 2.0 * experts.values)
    return experts.layers * (2.0 * routed * experts.hidden**2 + down)


def _sampling_seconds(sizes: ModelSizes, source_nbytes: int, recipe: Recipe, speed: Speed) -> float:
    resident, cache = sampling_room(sizes, recipe.device)
    batches = -(-recipe.sampled // sequences_at_once(sizes.cache_nbytes, recipe.seq_len, cache))
    step = (sizes.parameters / speed.sampling) + len(sizes.blocks) * speed.call
    if not resident:
        step += source_nbytes * sum(sizes.blocks) / sizes.parameters / speed.reading
    return recipe.seq_len * batches * step


def _solving(method: Method, specs: Sequence[WeightSpec], device: str) -> float:
    """Operations per second of the method on small matrices like those that take longest."""
    quick, random = method.quick(), torch.Generator().manual_seed(0)
    small = list(dict.fromkeys(_small(spec) for spec in sorted(specs, key=method.flops, reverse=True)))[:SHAPES]
    flops = seconds = 0.0
    # The first solve of a process is a warm-up and does not count.
    for number, spec in enumerate([small[-1], *small]):
        weight = torch.randn(spec.d_out, spec.d_in, generator=random, **FLOATS).to(device)
        x = torch.randn(2 * spec.d_in, spec.d_in, generator=random, **FLOATS).to(device)
        gram = (x.T @ x).double() / len(x)
        statistics = InputStatistics(len(x), gram.diagonal().float(), gram)

        def solve(spec: WeightSpec = spec, weight: Tensor = weight, found: InputStatistics = statistics) -> None:
            quick.compress(weight, found, spec)

        try:
            solve_seconds = _timed(solve, 0.0)
        except HalfplateError:
            # A valid specification may still not fit a matrix this small.
            continue
        if number:
            flops, seconds = flops + quick.flops(spec), seconds + solve_seconds
    return flops / seconds if seconds else 1e10


def _small(spec: WeightSpec) -> WeightSpec:
    """The same specification without sides longer than LONGEST_SIDE, for a matrix on its own."""
    m = spec.pattern.m
    d_in = spec.d_in if spec.d_in <= LONGEST_SIDE else LONGEST_SIDE // m * m
    return replace(spec, d_out=min(spec.d_out, LONGEST_SIDE), d_in=d_in, in_shared=None)


def _products(sizes: ModelSizes, recipe: Recipe) -> float:
    """Operations per second of a matrix product of many tokens with a weight."""
    tokens = min(BATCH * recipe.seq_len, 1024)
    d_in, d_out = min(sizes.hidden, 2048), min(sizes.ffn, 2048)
    x, weight = (torch.ones(rows, d_in, dtype=torch.float32, device=recipe.device) for rows in (tokens, d_out))
    with products(recipe.precision, torch.device(recipe.device).type):
        return 2.0 * tokens * d_in * d_out / _timed(lambda: functional.linear(x, weight))


def _sampling(sizes: ModelSizes, recipe: Recipe) -> float:
    """Weights per second in products with parallel sequences; more weights than a cache holds, if the model has as many."""
    resident, cache = sampling_room(sizes, recipe.device)
    rows = min(recipe.samples, sequences_at_once(sizes.cache_nbytes, recipe.seq_len, cache))
    matrices = max(1, min(24_000_000, sizes.parameters) // min(sizes.largest, 4_000_000))
    d_in = min(sizes.hidden, 2048)
    d_out = max(1, min(sizes.largest, 4_000_000) // d_in)
    linears = [nn.Linear(d_in, d_out, bias=False, dtype=torch.float32, device=recipe.device) for _ in range(matrices)]
    pack = bf16_kernels(recipe.device) if resident else None
    weights = linears if pack is None else [pack(linear) for linear in linears]
    x = torch.ones(rows, d_in, dtype=torch.float32, device=recipe.device)

    def step() -> None:
        for weight in weights:
            weight(x)

    return len(weights) * d_out * d_in / _timed(step)


def _reading(source: Source) -> float:
    """Bytes per second from the weight files to checked fp32 values."""
    fitting = [stored for stored in source.tensors.values() if stored.nbytes <= LONGEST_READ]
    if not fitting:
        return 5e8
    stored = max(fitting, key=lambda tensor: tensor.nbytes)
    try:
        return stored.nbytes / _timed(lambda: read_tensor(stored).to(torch.float32).aminmax(), 0.0)
    except (OSError, DamagedFile, RuntimeError):
        # The run will report errors in reading.
        return 5e8


def _call() -> float:
    x, weight = torch.ones(1, 32, **FLOATS), torch.ones(32, 32, **FLOATS)
    return SMALL_OPERATIONS * _timed(lambda: functional.linear(x, weight), LEAST_SECONDS / 10)


def _timed(run: Callable[[], object], least: float = LEAST_SECONDS) -> float:
    """Seconds per call after a warm-up call, over calls that together take a minimum time."""
    if least:
        run()
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < least:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
