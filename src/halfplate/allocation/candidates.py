"""The candidate formats of a matrix, among which a budget chooses."""

from collections.abc import Iterable
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


def candidates(spec: WeightSpec, method: Method, choose: Iterable[str], target: Target = HALFPLATE) -> list[WeightSpec]:
    """The candidates for `spec` if the fields `choose` (of CHOICES) may vary: `spec` itself, and smaller formats that `method` supports.

    Both wrappers have the same block size; `uneven` returns the others. Cheaper candidates come first. Candidates that are not
    smaller than the original matrix are omitted, and those that `target` does not store exactly, unless it stores none.
    """
    choose = set(choose)
    blocks = BLOCKS if "block_size" in choose and method.wrapped and target.sparse else (None,)
    patterns = PATTERNS if "pattern" in choose and target.sparse else (None,)
    found = {spec}
    for block, pattern, (core, group) in product(blocks, patterns, _cores(spec, target.cores(spec), choose)):
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
    cores = _cores(spec, target.tables(spec), {*choose, "core_dtype"})
    return _by_bytes((replace(spec, core_dtype=core, group=group) for core, group in cores), target) or [spec]


def _cores(spec: WeightSpec, offered: Iterable[Core], choose: set[str]) -> list[tuple[str, int]]:
    """Types of a core with their groups, of those a target offers."""
    if "core_dtype" not in choose:
        offered = [(spec.core_dtype, None)]
    groups = GROUPS[1:] if "group_size" in choose else (spec.group,)  # no kernel has the smallest
    return [(core, one) for core, group in offered for one in (groups if group is None else (group,))]


def uneven(spec: WeightSpec, method: Method, choose: Iterable[str]) -> list[WeightSpec]:
    """`spec` with a different block size on one side, cheaper ones first; empty if block sizes may not vary.

    All pairs would be sixteen per pattern and type, so a search only tries these next to the even candidates on its front.
    """
    if "block_size" not in set(choose) or not method.wrapped:
        return []
    found = set()
    for out_block, in_block in [(block, spec.in_block) for block in BLOCKS] + [
        (spec.out_block, block) for block in BLOCKS
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
