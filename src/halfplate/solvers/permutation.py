"""Reordering the input channels so that N:M pruning loses less."""

from importlib.util import find_spec

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern

CHUNK = 1 << 18  # values compared at once, so that they stay in the cache


def check_available() -> None:
    """Raise HalfplateError if scipy, which solves the assignments, is not installed."""
    if find_spec("scipy") is None:
        raise HalfplateError(
            "permute=True needs scipy, which is not installed; run `pip install 'halfplate[permutation]'`"
        )


def channel_permutation(score: Tensor, pattern: Pattern) -> Tensor:
    """The order of the columns of `score` in which the N largest of every M consecutive scores of a row have a larger sum.

    Returns int64 (d_in,): the column at each position. Columns are sorted by their sum and distributed over the groups in snake
    order. Then, for each of the M positions in turn, the columns at that position are reassigned to the groups by a linear sum
    assignment that maximises the retained score, so the score never falls.

    score: (d_out, d_in), 0 or more, finite.
    Source: Zhang et al., "Plug-and-Play" (ICLR 2024), section 3.3.
    """
    pattern.kept(score.shape[1])
    order = dealt(score, pattern.m)  # (groups, M)
    for place in range(pattern.m):
        order[:, place] = _assigned(score, order, place, pattern)
    return order.reshape(-1)


def retained(score: Tensor, order: Tensor, pattern: Pattern) -> float:
    """Sum of the scores that N:M keeps with the columns in `order`."""
    groups = score[:, order].reshape(len(score), -1, pattern.m)
    return float(groups.topk(pattern.n, dim=-1).values.sum(dtype=torch.float64))


def dealt(score: Tensor, m: int) -> Tensor:
    """Columns sorted by decreasing sum of scores, distributed over the groups in snake order: int64 (d_in / m, m)."""
    ranks = score.sum(0, dtype=torch.float64).argsort(descending=True, stable=True)
    rounds = ranks.reshape(m, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def _assigned(score: Tensor, order: Tensor, place: int, pattern: Pattern) -> Tensor:
    """The columns at position `place` of each group of `order`, assigned to the groups so that most is retained: int64 (groups,)."""
    from scipy.optimize import linear_sum_assignment

    rest = order[:, [other for other in range(pattern.m) if other != place]]
    # A column adds to a group its excess over the N-th largest of the other columns there.
    least = score[:, rest].topk(pattern.n, dim=-1).values[..., -1].T.contiguous()  # (groups, d_out)
    moving = order[:, place]
    columns = score[:, moving].T.contiguous()  # (columns, d_out)
    gains = torch.empty(len(moving), len(least), dtype=torch.float64, device=score.device)
    step = max(CHUNK // least.numel(), 1)
    for start in range(0, len(moving), step):
        above = (columns[start : start + step, None] - least).clamp_min_(0)  # (step, groups, d_out)
        gains[start : start + step] = above.sum(-1)
    chosen, groups = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    assigned = torch.empty_like(moving)
    assigned[torch.as_tensor(groups, dtype=torch.int64, device="cpu")] = moving[
        torch.as_tensor(chosen, dtype=torch.int64, device="cpu")
    ]
    return assigned
