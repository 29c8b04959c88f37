"""What a compressed matrix looks like in memory and on disk, known before it is computed."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from halfplate.dtypes import STORED, WRAPPER_DTYPES, check_dtype
from halfplate.errors import HalfplateError
from halfplate.formats.packing import packed_nbytes
from halfplate.formats.quantizers import core_dtypes, quantizer_of
from halfplate.formats.rounding import GROUP, GROUPS
from halfplate.pattern import Pattern

TWO_OF_FOUR = Pattern(2, 4)
# Fields that the JSON leaves out where they have these values.
OPTIONAL: dict[str, Any] = {"rank": 0, "permuted": False, "group": GROUP, "in_shared": None}


@dataclass(frozen=True)
class WeightSpec:
    """Shape, pattern, block sizes, rank and element types of one compressed matrix `A · S · B + L · R`.

    A block size of 0 means that the wrapper is absent, 1 that it is diagonal; a rank of 0 that nothing is added. core_dtype:
    one of `core_dtypes()` (halfplate.formats.quantizers), wrapper_dtype, which is also that of L and R, of WRAPPER_DTYPES
    (halfplate.dtypes). permuted: whether
    the inputs are taken in an order of the matrix's own. group: columns that share a scale where the core lies on a grid, one
    of GROUPS (halfplate.formats.rounding); it says nothing of other cores. in_shared: name of the module that stores B, where
    that is another one (halfplate.formats.sharing). This is the entry of one matrix under
    `quantization_config.modules` in `config.json`; `layout` derives every stored tensor from it.
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
        if self.rank < 0:
            raise HalfplateError(f"rank={self.rank} must be 0 (nothing added) or positive")
        if self.rank and self.wrapper_dtype not in STORED:
            raise HalfplateError(
                f"wrapper_dtype={self.wrapper_dtype!r} is not a type for a low-rank part (rank={self.rank}); use {', '.join(STORED)}"
            )
        if self.in_shared is not None and not (self.in_shared and self.in_block):
            raise HalfplateError(
                f"in_shared={self.in_shared!r} with in_block={self.in_block} shares no wrapper; name a module and give a block size"
            )
        # Blocks of 1 are a scale per input: they commute with the mask, so no group straddles two of them.
        if self.in_block > 1 and self.in_block % self.pattern.m:
            down = self.in_block // self.pattern.m * self.pattern.m
            tries = [b for b in (down, down + self.pattern.m) if b]
            raise HalfplateError(
                f"block_size={self.in_block} is not a multiple of M={self.pattern.m} (pattern {self.pattern}); "
                f"try {' or '.join(map(str, tries))}"
            )

    @property
    def format(self) -> str:
        """`nm` for a bare sparse core, `dense` for a bare dense one, `chain` where a wrapper stands around it, `sum` with a rank."""
        if self.rank:
            return "sum"
        if self.out_block or self.in_block:
            return "chain"
        return "dense" if self.pattern.is_dense else "nm"

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor, by its name below the module (`weight`, `weight_index`, ...)."""
        layout = self._core_layout()
        for side, size, block in (("out", self.d_out, self.out_block), ("in", self.d_in, self.in_block)):
            if block == 0 or (side == "in" and self.in_shared):
                continue
            dtype = STORED.get(self.wrapper_dtype, torch.int8)
            full, rest = divmod(size, block)
            if full:
                layout[f"weight_{side}_blocks"] = ((full, block, block), dtype)
            if rest:
                layout[f"weight_{side}_tail"] = ((rest, rest), dtype)
            if dtype == torch.int8:
                layout[f"weight_{side}_scales"] = ((size,), torch.float16)
        if self.rank:
            layout["weight_left"] = ((self.d_out, self.rank), STORED[self.wrapper_dtype])
            layout["weight_right"] = ((self.rank, self.d_in), STORED[self.wrapper_dtype])
        if self.permuted:
            layout["weight_permutation"] = ((self.d_in,), permutation_dtype(self.d_in))
        return layout

    def _core_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        kept, quantizer = self.pattern.kept(self.d_in), quantizer_of(self.core_dtype)
        shape: tuple[int, ...] = (self.d_out, kept if quantizer is None else packed_nbytes(kept, quantizer.bits))
        # The dense layer that a stranger builds must refuse this tensor, which has the dense name, for its shape.
        if self.pattern.is_dense:
            shape = (1, *shape)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": (shape, STORED.get(self.core_dtype, torch.uint8))
        }
        if not self.pattern.is_dense:
            layout["weight_index"] = ((self.d_out, self.pattern.index_nbytes(self.d_in)), torch.uint8)
        for name in () if quantizer is None else quantizer.stored:
            layout[f"weight_{name}"] = ((self.d_out, -(-self.d_in // self.group)), torch.float16)
        return layout

    @property
    def alone(self) -> "WeightSpec":
        """The same matrix with all its tensors of its own."""
        return replace(self, in_shared=None) if self.in_shared else self

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, positions included, bias and what another module stores excluded."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.layout().values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the matrix it stands for, at 2 bytes a weight."""
        return 2 * self.d_out * self.d_in

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back."""
        fields = asdict(self) | {"pattern": str(self.pattern), "shape": [self.d_out, self.d_in]}
        del fields["d_out"], fields["d_in"]
        for name, usual in OPTIONAL.items():
            if fields[name] == usual:
                del fields[name]
        return {"format": self.format} | fields

    @classmethod
    def from_json(cls, entry: Any, name: str) -> "WeightSpec":
        """Read an entry written by `to_json`; raises HalfplateError naming the module `name` on anything else."""
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
            if given["in_shared"] is not None and type(given["in_shared"]) is not str:
                raise TypeError("in_shared must be the name of a module")
            spec = cls(d_out=d_out, d_in=d_in, **fields)
        except (TypeError, ValueError, KeyError, HalfplateError) as error:
            raise HalfplateError(f"quantization_config.modules[{name!r}]={entry!r} cannot be read: {error}") from None
        if written != spec.format:
            raise HalfplateError(
                f"quantization_config.modules[{name!r}].format={written!r} does not fit its pattern, block sizes and rank; expected {spec.format!r}"
            )
        return spec


def permutation_dtype(d_in: int) -> torch.dtype:
    """The smallest type that can number the inputs 0 to d_in - 1."""
    return torch.int16 if d_in <= 1 << 15 else torch.int32
