"""Block-diagonal rotations that concentrate the importance of a weight in few entries, so that pruning loses less."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST = 1e-30  # smaller importances are treated as zero in the entropy


def concentrating_rotations(
    weight: Tensor,
    importance: Callable[[Tensor, Tensor], Tensor],
    moment: Tensor,
    out_block: int,
    in_block: int,
    steps: int,
    learning_rate: float,
) -> tuple[Tensor, Tensor]:
    """Orthogonal block-diagonal P and Q that minimise the entropy of the normalised importance of P W Qᵀ.

    Returns the blocks of P and of Q, fp32 (ceil(d / b), b, b), the last one padded with the identity. Each block is the Cayley
    transform (I − K)(I + K)⁻¹ of a skew-symmetric K, which Adam updates from 0.

    weight: W, fp32 (d_out, d_in).
    moment: a symmetric matrix (d_in, d_in), H or its inverse.
    importance: maps P W Qᵀ and the diagonal of Q moment Qᵀ, fp32 (d_in,), to scores of 0 or more, (d_out, d_in).
    out_block, in_block: block sizes, 0 or 1 for the identity.
    """
    d_out, d_in = weight.shape
    out_skew, in_skew = _skew(d_out, out_block, weight), _skew(d_in, in_block, weight)
    tiles = diagonal_blocks(moment.to(torch.float32), in_skew.shape[1])
    parameters = [skew for skew in (out_skew, in_skew) if skew.shape[1] > 1]
    if not (parameters and steps and bool(weight.any())):
        return cayley(out_skew), cayley(in_skew)
    best, found = torch.inf, (cayley(out_skew), cayley(in_skew))
    with torch.enable_grad():
        free = [skew.requires_grad_(True) for skew in parameters]
        optimizer = torch.optim.Adam(free, lr=learning_rate, betas=(0.9, 0.99))
        for step in range(steps + 1):
            rotations = cayley(_masked(out_skew, d_out)), cayley(_masked(in_skew, d_in))
            diagonal = ((rotations[1] @ tiles) * rotations[1]).sum(-1).reshape(-1)[:d_in]
            loss = entropy(importance(rotated(weight, *rotations), diagonal))
            if float(loss.detach()) < best:
                best, found = float(loss.detach()), (rotations[0].detach(), rotations[1].detach())
            if step < steps:
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return found


def entropy(scores: Tensor) -> Tensor:
    """−Σ p log p of scores of 0 or more, normalised to the sum 1."""
    total = scores.sum()
    return total.log() - (scores * (scores + SMALLEST).log()).sum() / total


def rotated(weight: Tensor, out_blocks: Tensor, in_blocks: Tensor) -> Tensor:
    """P W Qᵀ for the blocks of P and Q, without padding: (d_out, d_in)."""
    (rows, cols), d_out, d_in = (out_blocks.shape[:2], in_blocks.shape[:2]), *weight.shape
    padded = functional.pad(weight, (0, cols[0] * cols[1] - d_in, 0, rows[0] * rows[1] - d_out))
    turned = (out_blocks @ padded.reshape(*rows, -1)).reshape(len(padded), *cols)  # (rows, tiles, b)
    return torch.einsum("rtb,tcb->rtc", turned, in_blocks).reshape(len(padded), -1)[:d_out, :d_in]


def cayley(skew: Tensor) -> Tensor:
    """(I − K)(I + K)⁻¹ of K = (X − Xᵀ) / 2 for each X of (tiles, b, b): orthogonal, and the identity at X = 0."""
    k = (skew - skew.mT) / 2
    unit = torch.eye(skew.shape[1], dtype=skew.dtype, device=skew.device)
    solved: Tensor = torch.linalg.solve(unit + k, unit - k)  # both commute
    return solved


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """The blocks on the diagonal of a square matrix, the last padded with zeros: (tiles, block, block)."""
    padding = -len(matrix) % block
    padded = functional.pad(matrix, (0, padding, 0, padding))
    tiles = len(padded) // block
    return padded.reshape(tiles, block, tiles, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _skew(size: int, block: int, like: Tensor) -> Tensor:
    width = min(max(block, 1), size)
    return torch.zeros(-(-size // width), width, width, dtype=torch.float32, device=like.device)


def _masked(skew: Tensor, size: int) -> Tensor:
    """`skew` with zeros in the padding of the last block, which then remains the identity there."""
    rest = size % skew.shape[1]
    if not rest:
        return skew
    mask = torch.ones_like(skew)
    mask[-1, rest:], mask[-1, :, rest:] = 0, 0
    return skew * mask
