"""The losses of recovery: divergence from the teacher's next-token distributions, and relative error of its features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Rows of logits in fp32 at once. The gradient is computed in the same pass, to avoid a copy of all logits.
ROWS_AT_ONCE = 32


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(logits)
        for student_rows, teacher_rows, slot in zip(
            logits.split(ROWS_AT_ONCE), teacher.split(ROWS_AT_ONCE), gradient.split(ROWS_AT_ONCE), strict=True
        ):
            # (rows, vocabulary)
            log_q = student_rows.float().log_softmax(-1)
            log_p = teacher_rows.float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            slot.copy_((log_q.exp() - p) / len(logits))
        ctx.save_for_backward(gradient)
        return (total / len(logits)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats per token, fp32 (), of logits (tokens, vocabulary); differentiable with respect to `logits`."""
    result: Tensor = _Divergence.apply(logits, teacher)
    return result


def square_head(hidden: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of |h − t|² / |t|² for hidden states (samples, L, d) of student and teacher.

    Source: SquareHead in Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023.
    """
    errors = [(h.float() - t.float()).square().mean() for h, t in zip(hidden, teacher, strict=True)]
    sizes = [t.float().square().mean().clamp_min(1e-12) for t in teacher]
    return torch.stack([error / size for error, size in zip(errors, sizes, strict=True)]).mean()
