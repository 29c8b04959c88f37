"""Square block-diagonal matrices, the wrappers of ARMOR."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """A matrix (d, d) of equal blocks along the diagonal and, where they do not divide d, one smaller last block.

    blocks: (d // b, b, b) or None where b > d; tail: (d mod b, d mod b) or None where b divides d.
    """

    blocks: Tensor | None
    tail: Tensor | None

    @classmethod
    def from_padded(cls, blocks: Tensor, size: int, block: int, dtype: torch.dtype) -> "BlockDiagonal":
        """Cut blocks (ceil(size / block), b, b), the last of them padded, down to a matrix (size, size)."""
        full, rest = divmod(size, block)
        return cls(
            blocks[:full].to(dtype).contiguous() if full else None,
            blocks[full, :rest, :rest].to(dtype).contiguous() if rest else None,
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(part for part in (self.blocks, self.tail) if part is not None)

    @property
    def size(self) -> int:
        full = self.blocks.shape[0] * self.blocks.shape[1] if self.blocks is not None else 0
        return full + (self.tail.shape[0] if self.tail is not None else 0)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def tensors(self, side: str) -> dict[str, Tensor]:
        """Stored tensors by their name below the module; `side` is `out` or `in`."""
        named = {f"weight_{side}_blocks": self.blocks, f"weight_{side}_tail": self.tail}
        return {name: part for name, part in named.items() if part is not None}

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix with its zeros: (d, d)."""
        singles = [*self.blocks] if self.blocks is not None else []
        singles += [self.tail] if self.tail is not None else []
        dense: Tensor = torch.block_diag(*(single.to(dtype) for single in singles))
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to x Mᵀ (..., d), in the dtype of `x`."""
        outputs = []
        full = 0
        if self.blocks is not None:
            count, width = self.blocks.shape[:2]
            full = count * width
            grouped = x[..., :full].reshape(-1, count, width).transpose(0, 1)  # (count, tokens, b)
            product = grouped @ self.blocks.to(x.dtype).transpose(1, 2)
            outputs.append(product.transpose(0, 1).reshape(*x.shape[:-1], full))
        if self.tail is not None:
            outputs.append(x[..., full:] @ self.tail.to(x.dtype).T)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
