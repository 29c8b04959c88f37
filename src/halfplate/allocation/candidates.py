"""The candidate formats of a matrix, among which a budget chooses."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product

from halfplate.allocation.targets import HALFPLATE, Core, Target
from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.rounding import GROUPS
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method
from halfplate.pattern import Pattern

CHOICES = ("block_size", "pattern", "core_dtype", "group_size")
# Those that are free unless the recipe says otherwise. More candidates take more time to solve.
CHOSEN = CHOICES[:3]
BLOCKS = (0, 8, 16, 32)
PATTERNS = ("1:4", "2:4", "4:8", "3:4", "dense")


def fields_of(choose: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The fields that may vary, each with the values that it may have; no values stand for all that the target offers."""
    parts = (entry.partition("=") for entry in choose)
    return {field: tuple(values.split("+")) if equals else () for field, equals, values in parts}


def candidates(spec: WeightSpec, method: Method, choose: Iterable[str], target: Target = HALFPLATE) -> list[WeightSpec]:
    """The candidates for `spec` if the fields `choose` may vary: `spec` itself, and smaller formats that `method` supports.

    choose: of CHOICES, each alone or with its values, as in `core_dtype=nl4+nl5`.
    Both wrappers have the same block size; `uneven` returns the others. Cheaper candidates come first. Candidates that are not
    smaller than the original matrix are omitted, and those that `target` does not store exactly, unless it stores none.
    """
    fields = fields_of(choose)
    if spec.pattern.is_none:
        # What varies of a matrix without a core is its size, by the measure of the method.
        sizes = filter(_is_smaller, method.sizes(spec)) if "pattern" in fields else ()
        return _by_bytes(filter(target.holds, {spec, *sizes}), target) or [spec]
    blocks: Iterable[int | None] = (
        _blocks(fields) if "block_size" in fields and method.wrapped and target.sparse else (None,)
    )
    patterns = fields["pattern"] or PATTERNS if "pattern" in fields and target.sparse else (None,)
    found = {spec}
    for block, pattern, (core, group) in product(
        blocks, patterns, _cores(spec, _offered(spec, target, fields), fields)
    ):
        try:
            other = replace(
                spec,
                out_block=spec.out_block if block is None else block,
                in_block=spec.in_block if block is None else block,
                in_shared=None if block == 0 else spec.in_shared,
                pattern=spec.pattern if pattern is None else Pattern.parse(pattern),
                core_dtype=core,
                group=group if core in QUANTIZERS else spec.group,
            )
            method.check_spec(other)
        except HalfplateError:
            continue  # not supported by this method, or for a matrix of this size
        if _is_smaller(other):
            found.add(other)
    return _by_bytes(filter(target.holds, found), target) or [spec]


def table_candidates(spec: WeightSpec, choose: Iterable[str], target: Target = HALFPLATE) -> list[WeightSpec]:
    """What an embedding or a head of `spec` may become under a budget, the cheapest first."""
    cores = _cores(spec, target.tables(spec), fields_of(choose) | {"core_dtype": ()})
    return _by_bytes((replace(spec, core_dtype=core, group=group) for core, group in cores), target) or [spec]


def _offered(spec: WeightSpec, target: Target, fields: Mapping[str, tuple[str, ...]]) -> list[Core]:
    """The types of a core that the target offers, or those that are named, which may be others."""
    offered, named = list(target.cores(spec)), fields.get("core_dtype")
    if not named:
        return offered
    others = [(name, None) for name in named if name not in dict(offered)]
    return [core for core in offered if core[0] in named] + others


def _cores(spec: WeightSpec, offered: Iterable[Core], fields: Mapping[str, tuple[str, ...]]) -> list[tuple[str, int]]:
    """Types of a core with their groups, of those offered."""
    if "core_dtype" not in fields:
        offered = [(spec.core_dtype, None)]
    groups: Iterable[int] = (spec.group,)
    if "group_size" in fields:
        groups = tuple(map(int, fields["group_size"])) or GROUPS[1:]  # no kernel has the smallest
    return [(core, one) for core, group in offered for one in (groups if group is None else (group,))]


def _blocks(fields: Mapping[str, tuple[str, ...]]) -> tuple[int, ...]:
    return tuple(map(int, fields["block_size"])) or BLOCKS


def uneven(spec: WeightSpec, method: Method, choose: Iterable[str]) -> list[WeightSpec]:
    """`spec` with a different block size on one side, cheaper ones first; empty if block sizes may not vary.

    All pairs would be sixteen per pattern and type, so a search only tries these next to the even candidates on its front.
    """
    fields = fields_of(choose)
    if "block_size" not in fields or not method.wrapped:
        return []
    found, blocks = set(), _blocks(fields)
    for out_block, in_block in [(block, spec.in_block) for block in blocks] + [
        (spec.out_block, block) for block in blocks
    ]:
        try:
            other = replace(
                spec, out_block=out_block, in_block=in_block, in_shared=spec.in_shared if in_block else None
            )
            method.check_spec(other)
        except HalfplateError:
            continue
        if other != spec and _is_smaller(other):
            found.add(other)
    return _by_bytes(found, HALFPLATE)


def _is_smaller(spec: WeightSpec) -> bool:
    return spec.nbytes < spec.dense_nbytes and not (spec.pattern.is_dense and spec.core_dtype not in QUANTIZERS)


def _by_bytes(specs: Iterable[WeightSpec], target: Target) -> list[WeightSpec]:
    return sorted(specs, key=lambda level: (target.nbytes(level), str(level)))
