"""Square block-diagonal matrices, the wrappers of ARMOR."""

from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor

from halfplate.formats.quantizers.rounding import round_rows, round_to_float
from halfplate.formats.quantizers.uniform import INT8


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """A matrix (d, d) of equal blocks along the diagonal, and a smaller last block if their size does not divide d.

    blocks: (d // b, b, b), None if b > d.
    tail: (d mod b, d mod b), None if b divides d.
    scales: fp16 (d,), one factor per row if blocks and tail are int8; None for floating-point values.
    """

    blocks: Tensor | None
    tail: Tensor | None
    scales: Tensor | None = None

    @classmethod
    def from_padded(
        cls, blocks: Tensor, size: int, block: int, wrapper_dtype: str, energy: Tensor | None = None
    ) -> Self:
        """Cut blocks (ceil(size / block), b, b), the last one padded, to a matrix (size, size), and round it.

        energy: of each input, (size,), if they differ much; int8 rounding takes it into account.
        Raises HalfplateError if a value is too large for `wrapper_dtype`.
        """
        full, rest = divmod(size, block)
        whole = blocks[:full] if full else None
        return cls.rounded(whole, blocks[full, :rest, :rest] if rest else None, wrapper_dtype, energy)

    @classmethod
    def rounded(
        cls, blocks: Tensor | None, tail: Tensor | None, wrapper_dtype: str, energy: Tensor | None = None
    ) -> Self:
        """Round floating-point blocks and tail; raises HalfplateError if a value is too large for `wrapper_dtype`.

        energy: as in `from_padded`.
        """
        if wrapper_dtype != "int8":
            parts = [
                None if part is None else round_to_float(part, wrapper_dtype, "wrapper_dtype").contiguous()
                for part in (blocks, tail)
            ]
            return cls(*parts)
        whole = 0 if blocks is None else blocks.shape[0] * blocks.shape[1]
        energies = (None, None) if energy is None else (energy[:whole], energy[whole:])
        rounded = [
            (None, None)
            if part is None
            else round_rows(part, energy=None if each is None else each.reshape(*part.shape[:-2], 1, part.shape[-1]))
            for part, each in zip((blocks, tail), energies, strict=True)
        ]
        scales = torch.cat([scale.reshape(-1) for _, scale in rounded if scale is not None])
        return cls(rounded[0][0], rounded[1][0], scales)

    @property
    def size(self) -> int:
        return self._full + (self.tail.shape[0] if self.tail is not None else 0)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held().values())

    def held(self) -> dict[str, Tensor]:
        """The tensors that are not None: `blocks`, `tail`, `scales`."""
        named = {"blocks": self.blocks, "tail": self.tail, "scales": self.scales}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def cut(self, start: int, size: int, block: int) -> Self:
        """The matrix of the `size` rows and columns from `start` on, which begin at a block.

        They end at a block, at the end of the matrix, or before rows and columns of a block that the caller knows to be zeros.
        """
        first, (full, rest) = start // block, divmod(size, block)
        whole = cast(Tensor, self.blocks)[first : first + full].contiguous() if full else None
        tail = None
        if rest:
            at_the_end = self.tail is not None and start + size == self.size
            tail = self.tail if at_the_end else cast(Tensor, self.blocks)[first + full, :rest, :rest].contiguous()
        scales = None if self.scales is None else self.scales[start : start + size].contiguous()
        return type(self)(whole, tail, scales)

    def floats(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The values of blocks and tail, in `dtype`."""
        blocks, tail = self.blocks, self.tail
        if self.scales is not None:
            scales = self.scales.float()[:, None]
            if blocks is not None:
                blocks = INT8.decode(blocks, scales[: self._full].reshape(*blocks.shape[:2], 1))
            if tail is not None:
                tail = INT8.decode(tail, scales[self._full :])
        return None if blocks is None else blocks.to(dtype), None if tail is None else tail.to(dtype)

    def transposed(self, dtype: torch.dtype) -> "BlockDiagonal":
        """The transpose, in `dtype`."""
        blocks, tail = self.floats(dtype)
        return BlockDiagonal(None if blocks is None else blocks.mT, None if tail is None else tail.T)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The full matrix: (d, d)."""
        blocks, tail = self.floats(dtype)
        singles = [*blocks] if blocks is not None else []
        singles += [tail] if tail is not None else []
        dense: Tensor = torch.block_diag(*singles)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to x Mᵀ (..., d), in the dtype of `x`."""
        blocks, tail = self.floats(x.dtype)
        outputs = []
        if blocks is not None:
            count, width = blocks.shape[:2]
            grouped = x[..., : self._full].reshape(-1, count, width).transpose(0, 1)  # (count, tokens, b)
            product = grouped @ blocks.transpose(1, 2)
            outputs.append(product.transpose(0, 1).reshape(*x.shape[:-1], self._full))
        if tail is not None:
            outputs.append(x[..., self._full :] @ tail.T)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @property
    def _full(self) -> int:
        """Rows as equal blocks."""
        return self.blocks.shape[0] * self.blocks.shape[1] if self.blocks is not None else 0
