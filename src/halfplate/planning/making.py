"""Making a plan from a model and a recipe."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from halfplate.allocation.candidates import CHOICES, candidates, table_candidates
from halfplate.calibration.documents import SOURCES, check_source
from halfplate.calibration.mixture import parts_of
from halfplate.calibration.text import check_seq_len, check_tokens_fit
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.formats.parts import PARTS
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.sharing import share
from halfplate.formats.spec import WeightSpec
from halfplate.headroom import spoken, spoken_above
from halfplate.job import Job
from halfplate.limits import check_threads, check_workers
from halfplate.methods import METHODS, Method
from halfplate.models.data_reads import data_reads
from halfplate.models.linears import FoundLinear, find_blocks, find_linears, shared_linears
from halfplate.models.reading import reading
from halfplate.models.sources import Source, open_source, skeleton
from halfplate.pattern import Pattern
from halfplate.planning.disk import disk_plan
from halfplate.planning.fitting import Limit, Outside, limit_of, uncompressed
from halfplate.planning.memory import memory_plan, solving_memory
from halfplate.planning.plan import MatrixPlan, Plan, wrapper_share
from halfplate.planning.sizes import shared_inputs, sizes_of
from halfplate.planning.speed import WORTH_FLOPS, Speed, measure_speed, seconds_of, solving_flops
from halfplate.planning.tables import plan_tables
from halfplate.planning.transforming import plan_transforms
from halfplate.recipe import Recipe
from halfplate.statistics import Statistic
from halfplate.transforms import TRANSFORMS
from halfplate.version import package_version

AUTO_BLOCKS = (128, 64, 32, 16, 8)
AUTO_SHARE = 0.05  # share of the original parameters of the whole plan


@plain_defaults()
def make_plan(model: str, recipe: Recipe, measure: bool | None = False, workers: int = 1) -> Plan:
    """Plan the compression of `model` from its configuration, without reading weights; raises HalfplateError on bad input.

    measure: measure this machine for a few seconds, reading one tensor, to estimate the time; None does so only for long runs.
    workers: number of processes of the run.
    """
    check_threads(recipe.threads)
    check_workers(workers)
    return plan_source(open_source(model), recipe, measure, workers)


def plan_source(
    source: Source,
    recipe: Recipe,
    measure: bool | None = False,
    workers: int = 1,
    statistic: Statistic = Statistic.NONE,
) -> Plan:
    """`make_plan` for an open source. statistic: collect at least this one."""
    # From here on, `source` is the transformed model, as far as it is known without its tensors.
    original, (source, transforms) = source, plan_transforms(source, recipe)
    dense, job = skeleton(source), Job(recipe, statistic)
    method = job.method
    if job.reads_text:
        for part in parts_of(recipe.calibration):
            check_source(part.source)
    with _reading_modules(source):
        if job.reads_text:
            check_seq_len(dense, recipe.seq_len, least=2)
            check_tokens_fit("samples", recipe.samples, recipe.seq_len)
        reads, untraced = data_reads(dense, find_blocks(dense)[0])
        found, passed_over = find_linears(dense, recipe.include, recipe.exclude, reads)
    pattern = recipe.parsed_pattern
    fitting = [linear for linear in found if linear.d_in % pattern.m == 0]
    if not fitting:
        raise HalfplateError(_nothing_fits(source.name, found, pattern))
    block = _block_size(recipe, fitting) if method.wrapped or method.low_rank else 0

    @cache
    def spec_of(d_out: int, d_in: int, core_dtype: str, group: int) -> WeightSpec:
        spec = recipe.spec(d_out, d_in, block, core_dtype, group)
        method.check_spec(spec)
        return spec

    matrices = []
    for linear in found:
        spec, reason = None, None
        if linear.d_in % pattern.m:
            reason = f"d_in={linear.d_in} is not a multiple of M={pattern.m} (pattern {pattern})"
        else:
            try:
                spec = spec_of(linear.d_out, linear.d_in, *recipe.core_of(linear.name))
            except HalfplateError as refusal:
                raise HalfplateError(f"{linear.name}: {refusal}") from None
        matrices.append(MatrixPlan(linear.name, (linear.d_out, linear.d_in), linear.block, recipe.method, spec, reason))
    matrices += [
        MatrixPlan(skip.name, _shape(dense, skip.name), None, recipe.method, None, skip.reason) for skip in passed_over
    ]

    if recipe.share_wrappers:
        matrices = _sharing(dense, matrices)
    matrices = _borrowing(dense, matrices, recipe)
    compressed = {matrix.name: matrix.spec for matrix in matrices if matrix.spec is not None}
    specs = [spec for spec in compressed.values() if spec.same_as is None]
    with _reading_modules(source):
        sizes = sizes_of(dense, [linear for linear in found if linear.name in compressed], recipe.seq_len)
        tables = plan_tables(dense, recipe)
    of_tables = {table.name: table.spec for table in tables if table.spec is not None}
    outside = list(of_tables.values())
    others = uncompressed(dense, [*compressed, *of_tables])
    other_nbytes = _other_nbytes(others.values(), source.other_dtype)
    other_nbytes += sum(tensor.values_nbytes for tensor in source.further.values())
    tied = any(spec.same_as is not None for spec in outside) or "lm_head.weight" in (dense.all_tied_weights_keys or {})
    limit = limit_of(recipe, Outside(source, sizes, others, compressed | of_tables, other_nbytes, tied))
    if limit is not None:
        _check_limit(limit, specs, [table for table in tables if table.spec is not None], recipe, method)
    if measure is None:
        measure = sum(solving_flops(job, spec) for spec in specs) > WORTH_FLOPS
    speed = measure_speed(original, sizes, specs, job) if measure else None
    cost_of = cache(lambda spec: _cost(job, spec, speed))
    return Plan(
        model=source.name,
        job=job,
        matrices=tuple(m if m.spec is None else replace(m, **cost_of(m.spec)) for m in [*matrices, *tables]),
        block_size=block,
        parameters=sizes.parameters,
        other_nbytes=other_nbytes,
        source_nbytes=source.nbytes,
        fingerprint=_fingerprint(original, recipe),
        sizes=sizes,
        memory=memory_plan(sizes, specs, job, workers, max((step.memory for step in transforms), default=0), outside),
        disk=disk_plan(
            sizes,
            specs,
            other_nbytes + sum(spec.nbytes for spec in outside),
            job,
            workers,
            sum(step.disk for step in transforms),
            None if limit is None or limit.in_memory else limit.matrices,
        ),
        speed=speed,
        seconds=None if speed is None else seconds_of(sizes, specs, source.nbytes, job, speed),
        notes=source.notes,
        untraced=untraced,
        transforms=transforms,
        limit=limit,
    )


def _reading_modules(source: Source) -> AbstractContextManager[None]:
    """Context manager that turns exceptions into a HalfplateError while sizes are read from a model and its configuration."""
    what = f"sizes of a {source.config.model_type} model cannot be read"
    return reading(source.name, what, "correct its config.json or download the model again")


def _cost(job: Job, spec: WeightSpec, speed: Speed | None) -> dict[str, Any]:
    """The cost of solving a matrix, as fields of MatrixPlan."""
    if spec.same_as is not None:
        return {}
    flops = solving_flops(job, spec)
    seconds = None if speed is None else flops / speed.solving
    return {"flops": flops, "seconds": seconds, "memory": solving_memory(job, spec)}


def _sharing(dense: PreTrainedModel, matrices: list[MatrixPlan]) -> list[MatrixPlan]:
    """`matrices` with one input wrapper for all that read the same input."""
    names: dict[int, list[str]] = {}
    for matrix in matrices:
        if matrix.spec is not None and matrix.block is not None:
            names.setdefault(matrix.block, []).append(matrix.name)
    specs = share({matrix.name: matrix.spec for matrix in matrices if matrix.spec is not None}, _groups(dense, names))
    return [replace(matrix, spec=specs.get(matrix.name)) for matrix in matrices]


def _borrowing(dense: PreTrainedModel, matrices: list[MatrixPlan], recipe: Recipe) -> list[MatrixPlan]:
    """`matrices` in which linears that have the weight of an earlier layer are stored with that."""
    prefix = find_blocks(dense)[0]
    owners, by_name = shared_linears(dense, prefix), {matrix.name: matrix for matrix in matrices}
    if recipe.share_wrappers or recipe.tune_block:
        option = "share_wrappers" if recipe.share_wrappers else "tune_block"
        reason = f"several layers share its weight; not compressed with {option}"
        lent = {owner for owner in owners.values() if by_name[owner].spec is not None}
        left = lent | {name for name, owner in owners.items() if owner in lent}
        return [replace(m, spec=None, block=None, reason=reason) if m.name in left else m for m in matrices]
    found = []
    for matrix in matrices:
        owner = by_name.get(owners.get(matrix.name, ""))
        if owner is not None and owner.spec is not None:
            block = int(matrix.name.removeprefix(f"{prefix}.").partition(".")[0])
            matrix = replace(owner, name=matrix.name, block=block, spec=replace(owner.spec, same_as=owner.name))
        found.append(matrix)
    return found


def _groups(dense: PreTrainedModel, names: dict[int, list[str]]) -> list[list[str]]:
    """The linears `names` of each layer, grouped by shared input, each group in the order of the plan."""
    order = {name: index for inside in names.values() for index, name in enumerate(inside)}
    try:
        groups = shared_inputs(dense, names)
    # Model code can raise any exception if it needs values on the meta device.
    except Exception as error:
        raise HalfplateError(
            f"share_wrappers=True: which linears of {type(dense).__name__} share an input cannot be found without running it "
            f"({type(error).__name__}: {' '.join(str(error).split())}); leave it out"
        ) from error
    # The first in the order of the plan stores the wrapper.
    return [sorted(group, key=order.__getitem__) for group in groups]


def _check_limit(
    limit: Limit, specs: list[WeightSpec], tables: list[MatrixPlan], recipe: Recipe, method: Method
) -> None:
    """Raise HalfplateError, naming the least, if the cheapest candidates of all matrices exceed the limit."""

    def cheapest(table: MatrixPlan) -> int:
        assert table.spec is not None, "those that stay as they are have none"
        free = table_candidates(table.spec, recipe.choose, limit.target) if table.free else [table.spec]
        return min(map(limit.cost, free))

    cost_of = cache(
        lambda spec: min(limit.cost(level) for level in candidates(spec, method, recipe.choose, limit.target))
    )
    taken = sum(map(cheapest, tables))
    least = taken + sum(map(cost_of, specs))
    if least <= limit.matrices:
        return
    more = f", or add to --choose ({', '.join(CHOICES)})" if limit.target.sparse else ""
    cure = f"with choose={', '.join(recipe.choose) or 'nothing'}; raise it{more}"
    if recipe.budget is not None:
        whole = sum(spec.dense_nbytes for spec in [*specs, *(table.spec for table in tables if table.spec is not None)])
        of_tables = f" ({taken / whole:.4f} of them the embedding and the output layer)" if tables else ""
        raise HalfplateError(
            f"{limit.asked} cannot be met: the least is {least / whole:.4f} of the original bytes{of_tables} {cure}"
        )
    of_tables = f"{spoken(taken)} for the embedding and the output layer, " if tables else ""
    raise HalfplateError(
        f"{limit.asked} cannot be met: the least is {spoken_above(limit.outside + least)} ({of_tables}{spoken(least - taken)} for the matrices of "
        f"the layers, {spoken(limit.outside)} for everything else) {cure}"
    )


def _nothing_fits(name: str, found: list[FoundLinear], pattern: Pattern) -> str:
    if not found:
        return f"model={name!r} has no linear left to compress; loosen --include and --exclude"
    sizes = ", ".join(str(size) for size in sorted({linear.d_in for linear in found}))
    return f"pattern={pattern}: M={pattern.m} divides no d_in of {name!r} ({sizes}); choose an M that divides one"


def _block_size(recipe: Recipe, linears: list[FoundLinear]) -> int:
    """The block size of the recipe. `auto` is the largest one whose wrappers stay within AUTO_SHARE, or else the smallest."""
    if recipe.block_size != "auto":
        return recipe.block_size
    m, shapes = recipe.parsed_pattern.m, Counter((linear.d_out, linear.d_in) for linear in linears)
    blocks = [max(size // m, 1) * m for size in AUTO_BLOCKS]
    for block in blocks:
        if wrapper_share({recipe.spec(*shape, block): count for shape, count in shapes.items()}) <= AUTO_SHARE:
            return block
    # If a model is so small that no block size is cheap, wrappers still gain more than they cost.
    return blocks[-1]


def _shape(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    weight = getattr(model.get_submodule(name), "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None


def _other_nbytes(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> int:
    """Bytes of tensors that are not compressed, as they will be stored."""
    return sum(tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in tensors)


def _fingerprint(source: Source, recipe: Recipe) -> str:
    """SHA-256 of the model's configuration, names and sizes of its weight files, the recipe, the version and those of plugins."""
    identity = source.identity() | {
        "recipe": recipe.fingerprint_json(),
        "version": package_version(),
    }
    return hashlib.sha256(
        json.dumps(identity | foreign_packages(recipe), sort_keys=True, default=str).encode()
    ).hexdigest()


def foreign_packages(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Under `plugins`, the other packages that the method and all other names in the recipe come from, with their versions."""
    used = [
        ("method", METHODS.package(recipe.method)),
        ("core_dtype", QUANTIZERS.package(recipe.core_dtype)),
    ]
    names = [label.partition("@")[0] for label in recipe.transforms]
    sources = [part.source.partition(":")[0] for part in parts_of(recipe.calibration)]
    used += [("calibration" if len(sources) == 1 else f"calibration {name}", SOURCES.package(name)) for name in sources]
    used += [(f"transform {name}", TRANSFORMS.package(name)) for name in names]
    used += [(f"part {part.name}", PARTS.package(part.name)) for part in recipe.create_method().parts]
    found = {field: package for field, package in used if package is not None}
    return {"plugins": found} if found else {}
