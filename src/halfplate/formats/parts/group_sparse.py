"""Groups of consecutive inputs, of which each row keeps a few as codes of a quantizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats.encoding.packing import check_padding, pack, packed_nbytes, unpack
from halfplate.formats.parts.base import Forward, Layout, Outer, TrainableNumbers, TrainableOuter
from halfplate.formats.parts.options import whole_numbers
from halfplate.formats.quantizers.uniform import INT4

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

NAME = "group_sparse"
CODES, SCALES, CHOSEN = "weight_group_codes", "weight_group_scales", "weight_groups"
WIDEST = 1 << 12  # columns of a group
OFFSET = 1 << INT4.bits - 1


@dataclass(frozen=True, eq=False)
class GroupSparse(Outer):
    """W = inner + S: a row of S keeps `kept` groups of `width` consecutive inputs, as int4 with one scale a group.

    Options: `width`, even, and `kept`. The last group has zeros beyond d_in. Source of the form: GQSA, arXiv 2412.17560.

    codes: packed, uint8 (d_out, kept · width / 2). scales: fp16 (d_out, kept).
    chosen: which groups are kept, one bit a group, uint8 (d_out, ceil(d_in / width / 8)).
    """

    codes: Tensor
    scales: Tensor
    chosen: Tensor
    width: int
    d_in: int
    kinds = ("kept values", "positions", "scales")

    @classmethod
    def of(cls, integers: Tensor, scales: Tensor, chosen: Tensor, width: int) -> "GroupSparse":
        """integers: q, int8 (d_out, d_in), zero where dropped. scales: fp16 (d_out, groups). chosen: bool (d_out, groups), equally many a row."""
        rows, groups = chosen.shape
        padded = torch.nn.functional.pad(integers, (0, groups * width - integers.shape[1])).unflatten(
            1, (groups, width)
        )
        codes = pack(padded[chosen].reshape(rows, -1).to(torch.int16) + OFFSET, INT4.bits)
        return cls(codes, scales[chosen].reshape(rows, -1), pack(chosen, 1), width, integers.shape[1])

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        width, kept = whole_numbers(spec, NAME, width=WIDEST, kept=spec.d_in)
        if width % 2:
            raise HalfplateError(f"width={width} must be even; try 16")
        if kept > _groups(spec):
            raise HalfplateError(f"kept={kept} must be at most the {_groups(spec)} groups of a row")

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        width, kept = (int(spec.options(NAME)[name]) for name in ("width", "kept"))
        return {
            CODES: ((spec.d_out, packed_nbytes(kept * width, INT4.bits)), torch.uint8),
            SCALES: ((spec.d_out, kept), torch.float16),
            CHOSEN: ((spec.d_out, packed_nbytes(_groups(spec), 1)), torch.uint8),
        }

    @classmethod
    def kind(cls, tensor: str) -> str:
        return {CODES: "kept values", CHOSEN: "positions"}.get(tensor, "scales")

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        kept = int(spec.options(NAME)["kept"])
        if tensor == CHOSEN:
            check_padding(values, _groups(spec), 1, name)
            counts = unpack(values, _groups(spec), 1).sum(1, dtype=torch.int64)
            if bool((counts != kept).any()):
                raise HalfplateError(
                    f"{name} chooses {int(counts[counts != kept][0])} groups in a row, expected {kept}; the file is damaged, write it again"
                )

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        width = int(spec.options(NAME)["width"])
        return cls(tensors[CODES], tensors[SCALES], tensors[CHOSEN], width, spec.d_in)

    def tensors(self) -> dict[str, Tensor]:
        return {CODES: self.codes, SCALES: self.scales, CHOSEN: self.chosen}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The full matrix: (d_out, d_in)."""
        kept = self.scales.shape[1]
        integers = unpack(self.codes, kept * self.width, INT4.bits).float() - OFFSET
        values = integers.unflatten(1, (kept, self.width)) * self.scales.float()[:, :, None]
        support = unpack(self.chosen, -(-self.d_in // self.width), 1).bool()[:, :, None].expand(-1, -1, self.width)
        zeros = torch.zeros(support.shape, dtype=dtype, device=values.device)
        return zeros.masked_scatter(support, values.to(dtype)).flatten(1)[:, : self.d_in]

    def around(self, matrix: Tensor) -> Tensor:
        return matrix + self.dense(matrix.dtype)

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        return inner(x) + x @ self.dense(x.dtype).T

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        rows = slice(start, start + spec.d_out)
        codes, scales, chosen = (part[rows].contiguous() for part in (self.codes, self.scales, self.chosen))
        return type(self)(codes, scales, chosen, self.width, self.d_in)

    def trainable(self, spec: "WeightSpec", values_too: bool) -> TrainableOuter[Outer]:
        return TrainableGroups(self, spec)


def _groups(spec: "WeightSpec") -> int:
    """Groups of a row, the last of which may be padded."""
    return -(-spec.d_in // int(spec.options(NAME)["width"]))


class TrainableGroups(TrainableNumbers[GroupSparse]):
    """The scales are parameters, as in the second stage of GQSA; a scale that becomes negative is stored as zero."""

    group_scales: Tensor

    def stored(self) -> GroupSparse:
        with torch.no_grad():
            self.group_scales.clamp_(min=0)
        return super().stored()
