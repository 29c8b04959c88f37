"""The wrappers of ARMOR: block-diagonal matrices before and after a core."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.parts.base import Forward, Layout, Outer, TrainableOuter
from halfplate.formats.parts.block_diagonal import BlockDiagonal

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec


class Wrapper(BlockDiagonal, Outer):
    """A block-diagonal factor on one side. side: `out` or `in`, as in the names of its tensors."""

    side: ClassVar[str]
    kinds = ("wrappers", "scales")

    @classmethod
    def extent(cls, spec: "WeightSpec") -> tuple[int, int]:
        """Size of the matrix, and of its blocks."""
        return (spec.d_out, spec.out_block) if cls.side == "out" else (spec.d_in, spec.in_block)

    @classmethod
    def present(cls, spec: "WeightSpec") -> bool:
        return cls.extent(spec)[1] > 0

    @classmethod
    def kind(cls, tensor: str) -> str:
        return "scales" if tensor.endswith("_scales") else "wrappers"

    @classmethod
    def layout(cls, spec: "WeightSpec") -> Layout:
        size, block = cls.extent(spec)
        dtype, layout = STORED.get(spec.wrapper_dtype, torch.int8), Layout()
        full, rest = divmod(size, block)
        if full:
            layout[f"weight_{cls.side}_blocks"] = ((full, block, block), dtype)
        if rest:
            layout[f"weight_{cls.side}_tail"] = ((rest, rest), dtype)
        if dtype == torch.int8:
            layout[f"weight_{cls.side}_scales"] = ((size,), torch.float16)
        return layout

    @classmethod
    def check(cls, spec: "WeightSpec", tensor: str, values: Tensor, name: str) -> None:
        if values.dtype == torch.int8 and bool((values == -128).any()):
            raise HalfplateError(f"{name} holds -128, expected -127 to 127; the file is damaged, write it again")

    @classmethod
    def from_tensors(cls, spec: "WeightSpec", tensors: Mapping[str, Tensor]) -> Self:
        return cls(*(tensors.get(f"weight_{cls.side}_{part}") for part in ("blocks", "tail", "scales")))

    def tensors(self) -> dict[str, Tensor]:
        return {f"weight_{self.side}_{name}": tensor for name, tensor in self.held().items()}

    def trainable(self, spec: "WeightSpec", values_too: bool) -> "TrainableWrapper":
        return TrainableWrapper(self, spec)


class OutWrapper(Wrapper):
    """A of A · S · B: after the core, on the outputs."""

    side = "out"

    @classmethod
    def rows_together(cls, spec: "WeightSpec") -> int:
        return spec.out_block

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        return self.forward(inner(x))

    def around(self, matrix: Tensor) -> Tensor:
        return self.forward(matrix.T).T

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        return self.cut(start, spec.d_out, spec.out_block)

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        return 1

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        return self  # A is linear: A · Σ y = Σ A · y


class InWrapper(Wrapper):
    """B of A · S · B: before the core, on the inputs. Of several matrices with the same input, the first one may store it for all."""

    side = "in"

    @classmethod
    def check_spec(cls, spec: "WeightSpec") -> None:
        # Blocks of 1 are a scale per input. They commute with the mask, so N:M groups may straddle them.
        block, m = spec.in_block, spec.pattern.m
        if block > 1 and block % m:
            tries = [str(size) for size in (block // m * m, block // m * m + m) if size]
            raise HalfplateError(
                f"block_size={block} is not a multiple of M={m} (pattern {spec.pattern}); try {' or '.join(tries)}"
            )

    @classmethod
    def borrowed(cls, spec: "WeightSpec") -> bool:
        return spec.in_shared is not None

    def apply(self, x: Tensor, inner: Forward) -> Tensor:
        return inner(self.forward(x))

    def around(self, matrix: Tensor) -> Tensor:
        # forward multiplies rows by the transpose; forward of the transpose multiplies them by the wrapper itself.
        return self.transposed(matrix.dtype).forward(matrix)

    def rows(self, spec: "WeightSpec", start: int) -> Self:
        return self

    @classmethod
    def columns_together(cls, spec: "WeightSpec") -> int | None:
        return spec.in_block

    def cut_columns(self, spec: "WeightSpec", start: int) -> Self:
        return self.cut(start, spec.d_in, spec.in_block)


class TrainableWrapper(TrainableOuter[Wrapper]):
    """The values of a wrapper in fp32, whatever its stored type."""

    blocks: nn.Parameter | None
    tail: nn.Parameter | None

    def __init__(self, wrapper: Wrapper, spec: "WeightSpec") -> None:
        super().__init__()
        self._class, self._dtype = type(wrapper), spec.wrapper_dtype
        for name, part in zip(("blocks", "tail"), wrapper.floats(torch.float32), strict=True):
            self.register_parameter(name, None if part is None else nn.Parameter(part.clone()))

    def current(self) -> Wrapper:
        return self._class(self.blocks, self.tail)

    def stored(self) -> Wrapper:
        return self._class.rounded(self.blocks, self.tail, self._dtype)
