"""The specification of a compressed matrix in memory and on disk, known before it is computed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from halfplate.dtypes import WRAPPER_DTYPES, check_dtype
from halfplate.errors import HalfplateError
from halfplate.formats.parts import FIRST, classes_of
from halfplate.formats.parts.base import Layout, Outer, Part
from halfplate.formats.quantizers import core_dtypes
from halfplate.formats.quantizers.rounding import GROUP, GROUPS
from halfplate.pattern import Pattern

if TYPE_CHECKING:
    from halfplate.formats.parts.core import NMSparse

TWO_OF_FOUR = Pattern(2, 4)
# Fields that the JSON leaves out where they have these values.
OPTIONAL: dict[str, Any] = {
    "rank": 0,
    "permuted": False,
    "group": GROUP,
    "in_shared": None,
    "same_as": None,
    "parts": (),
}


@dataclass(frozen=True)
class ExtraPart:
    """A part without its own field in a specification: its name in `PARTS` (halfplate.formats.parts), and its options."""

    name: str
    options: tuple[tuple[str, str | int | float | bool], ...] = ()

    @classmethod
    def of(cls, name: str, **options: str | int | float | bool) -> "ExtraPart":
        """The part `name` with these options, in a canonical order."""
        return cls(name, tuple(sorted(options.items())))


@dataclass(frozen=True)
class WeightSpec:
    """Shape, pattern, block sizes, rank and element types of one compressed matrix, e.g. `A · S · B + L · R`.

    pattern: which values of each row the core keeps.
    core_dtype: one of `core_dtypes()` (halfplate.formats.quantizers).
    out_block, in_block: sizes of the blocks of A and B; 0 if the wrapper is absent, 1 if it is diagonal.
    wrapper_dtype: element type of A, B, L and R, one of WRAPPER_DTYPES (halfplate.dtypes).
    rank: of L · R; 0 if nothing is added.
    permuted: whether the matrix reorders its inputs.
    group: columns per scale of an integer core, one of GROUPS (halfplate.formats.quantizers.rounding).
    in_shared: name of the module that stores B, if that is another one (halfplate.formats.sharing).
    same_as: name of the module that stores every tensor, if that is another one: the embedding that a head is tied to, or a linear of an earlier layer.
    parts: any other parts, in the order of their names.

    This is the entry of one matrix under `quantization_config.modules` in `config.json`; `layout` derives every stored tensor from it.
    """

    d_out: int
    d_in: int
    pattern: Pattern = TWO_OF_FOUR
    core_dtype: str = "bf16"
    out_block: int = 0
    in_block: int = 0
    wrapper_dtype: str = "bf16"
    rank: int = 0
    permuted: bool = False
    group: int = GROUP
    in_shared: str | None = None
    same_as: str | None = None
    parts: tuple[ExtraPart, ...] = ()

    def __post_init__(self) -> None:
        check_dtype(self.core_dtype, "core_dtype", core_dtypes())
        check_dtype(self.wrapper_dtype, "wrapper_dtype", WRAPPER_DTYPES)
        self.pattern.kept(self.d_in)
        for side in ("d_out", "d_in"):
            if getattr(self, side) < 1:
                raise HalfplateError(f"{side}={getattr(self, side)} must be at least 1")
        for side in ("out_block", "in_block"):
            if getattr(self, side) < 0:
                raise HalfplateError(f"{side}={getattr(self, side)} must be 0 (no wrapper) or a positive block size")
        if self.group not in GROUPS:
            raise HalfplateError(f"group_size={self.group} is not one of {', '.join(map(str, GROUPS))}")
        if self.group < GROUPS[1] and not self.pattern.is_dense:
            raise HalfplateError(
                f"group_size={self.group} is for unpruned cores, and the pattern is {self.pattern}; use group_size {GROUPS[1]} or pattern dense"
            )
        if self.rank < 0:
            raise HalfplateError(f"rank={self.rank} must be 0 (nothing added) or positive")
        if self.in_shared is not None and not (self.in_shared and self.in_block):
            raise HalfplateError(
                f"in_shared={self.in_shared!r} with in_block={self.in_block} shares no wrapper; name a module and give a block size"
            )
        if self.same_as is not None and (not self.same_as or self.in_shared is not None):
            raise HalfplateError(
                f"same_as={self.same_as!r} with in_shared={self.in_shared!r}: expected the name of the module that stores all tensors, and no other"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        names = [extra.name for extra in self.parts]
        if names != sorted(set(names)) or set(names) & set(FIRST):
            raise HalfplateError(
                f"parts={names} must be named once each, in the order of their names, and other than {', '.join(FIRST)}"
            )
        for part in self.classes:
            part.check_spec(self)

    @property
    def format(self) -> str:
        """`nm` for only a sparse core, `dense` for only an unpruned one, `chain` with a wrapper, `sum` with a rank, `parts` with others."""
        if self.parts:
            return "parts"
        if self.rank:
            return "sum"
        if self.out_block or self.in_block:
            return "chain"
        return "dense" if self.pattern.is_dense else "nm"

    # Computed once with the specification, because compiled models read it at every step.
    @cached_property
    def classes(self) -> tuple[type[Part], ...]:
        """The classes of its parts, from the core outwards."""
        return classes_of(self)

    @property
    def core(self) -> "type[NMSparse]":
        """The class of the core."""
        return self.classes[0]  # type: ignore[return-value]  # the first is the core

    @property
    def outer(self) -> tuple[type[Outer], ...]:
        """The classes of the parts around the core."""
        return self.classes[1:]  # type: ignore[return-value]  # the first is the core

    def options(self, part: str) -> Mapping[str, str | int | float | bool]:
        """The options of one of `parts`; empty for others."""
        return next((dict(extra.options) for extra in self.parts if extra.name == part), {})

    def layout(self) -> Layout:
        """Shape and dtype of every stored tensor, by its name below the module (`weight`, `weight_index`, ...)."""
        return dict(self._layout)

    @cached_property
    def _layout(self) -> Layout:
        """`layout`, computed once: loading asks for it many times."""
        layout: Layout = {}
        for part in self._own:
            layout |= part.layout(self)
        return layout

    @cached_property
    def _own(self) -> tuple[type[Part], ...]:
        """The classes of the parts whose tensors are stored with this matrix."""
        return tuple(part for part in self.classes if self.same_as is None and not part.borrowed(self))

    @cached_property
    def borrowed(self) -> frozenset[str]:
        """The names of the tensors that another module stores for this matrix."""
        return frozenset().union(*(part.layout(self) for part in self.classes if part not in self._own))

    def kinds(self) -> dict[str, str]:
        """What every stored tensor holds, in words for tables, by its name below the module."""
        return {name: part.kind(name) for part in self._own for name in part.layout(self)}

    def steps(self) -> list[list[str]]:
        """The tensors of each step of size that a reader may leave out from the end, by their names below the module; empty without steps."""
        found: dict[int, list[str]] = {}
        for part in self._own:
            for name in part.layout(self):
                if (step := part.step(name)) is not None:
                    found.setdefault(step, []).append(name)
        return [found[step] for step in sorted(found)]

    def at_steps(self, steps: int) -> "WeightSpec":
        """The same matrix with its first `steps` steps alone."""
        for part in self._own:
            if any(part.step(name) is not None for name in part.layout(self)):
                return part.at_steps(self, steps)
        return self

    @property
    def trains_beside_core(self) -> bool:
        """Whether it has trainable values outside its core."""
        return any(part.trained for part in self.outer)

    @property
    def numbers_beside_core(self) -> int:
        """Number of values stored outside the core, without scales and permutations."""
        layout, kinds = self.layout(), self.kinds()
        numbers = {part.kinds[0] for part in self.outer if part.trained}
        return sum(prod(shape) for name, (shape, _) in layout.items() if kinds[name] in numbers)

    @property
    def alone(self) -> "WeightSpec":
        """The same matrix with all its tensors of its own."""
        return replace(self, in_shared=None, same_as=None) if self.in_shared or self.same_as else self

    @property
    def lender(self) -> str | None:
        """The name of the module that stores some or all of its tensors, if there is one."""
        return self.in_shared or self.same_as

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all stored tensors with positions, without the bias and tensors that another module stores."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.layout().values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the matrix it stands for, at 2 bytes a weight; 0 if another module stores it."""
        return 0 if self.same_as else 2 * self.d_out * self.d_in

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back."""
        fields = asdict(self) | {"pattern": str(self.pattern), "shape": [self.d_out, self.d_in]}
        del fields["d_out"], fields["d_in"]
        fields["parts"] = {extra.name: dict(extra.options) for extra in self.parts} or ()
        for name, usual in OPTIONAL.items():
            if fields[name] == usual:
                del fields[name]
        return {"format": self.format} | fields

    @classmethod
    def from_json(cls, entry: Any, name: str) -> "WeightSpec":
        """Read an entry written by `to_json`; raises HalfplateError naming the module `name` if it is invalid."""
        try:
            fields = dict(entry)
            written, (d_out, d_in) = fields.pop("format"), fields.pop("shape")
            if fields.keys() - OPTIONAL.keys() != {"pattern", "core_dtype", "out_block", "in_block", "wrapper_dtype"}:
                raise TypeError(f"its keys are {sorted(map(str, entry))}")
            fields["pattern"] = Pattern.parse(fields["pattern"])
            given = OPTIONAL | fields
            integers = (d_out, d_in, *(given[name] for name in ("out_block", "in_block", "rank", "group")))
            if not all(type(value) is int for value in integers):
                raise TypeError("shape, block sizes, rank and group must be integers")
            if type(given["permuted"]) is not bool:
                raise TypeError("permuted must be true or false")
            for lender in ("in_shared", "same_as"):
                if given[lender] is not None and type(given[lender]) is not str:
                    raise TypeError(f"{lender} must be the name of a module")
            fields["parts"] = _extra_parts(fields.pop("parts", {}))
            spec = cls(d_out=d_out, d_in=d_in, **fields)
        except (TypeError, ValueError, KeyError, HalfplateError) as error:
            raise HalfplateError(f"quantization_config.modules[{name!r}]={entry!r} cannot be read: {error}") from None
        if written != spec.format:
            raise HalfplateError(
                f"quantization_config.modules[{name!r}].format={written!r} does not fit its pattern, block sizes and rank; expected {spec.format!r}"
            )
        return spec


def _extra_parts(entry: Any) -> tuple[ExtraPart, ...]:
    """`parts` of a JSON entry; raises TypeError if it is not an object of objects of plain values."""
    if not isinstance(entry, dict) or not all(isinstance(options, dict) for options in entry.values()):
        raise TypeError("parts must be an object with the options of each part by its name")
    if not all(type(value) in (str, int, float, bool) for options in entry.values() for value in options.values()):
        raise TypeError("options of parts must be text, numbers, true or false")
    return tuple(ExtraPart.of(name, **options) for name, options in sorted(entry.items()))
