"""An order of the input channels in which N:M drops less."""

from importlib.util import find_spec

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern

CHUNK = 1 << 18  # numbers compared at once: they stay in the cache


def check_available() -> None:
    """Raise HalfplateError if scipy, which solves the assignments, is not installed."""
    if find_spec("scipy") is None:
        raise HalfplateError(
            "permute=True needs scipy, which is not installed; run `pip install 'halfplate[permutation]'`"
        )


def channel_permutation(score: Tensor, pattern: Pattern) -> Tensor:
    """The order of the columns of `score` in which the N largest of every M consecutive scores of a row sum to more.

    score: (d_out, d_in), 0 or more, finite. Returns int64 (d_in,): the column that stands at each place. Columns are sorted
    by their sum and dealt out to the groups in snake order; then, for each of the M places in turn, the columns that
    stand there are given to the groups anew, so that the retained score is the greatest (a linear sum assignment, which never
    lowers it). Source: Zhang et al., "Plug-and-Play" (ICLR 2024),
    section 3.3.
    """
    pattern.kept(score.shape[1])
    order = dealt(score, pattern.m)  # (groups, M)
    for place in range(pattern.m):
        order[:, place] = _assigned(score, order, place, pattern)
    return order.reshape(-1)


def retained(score: Tensor, order: Tensor, pattern: Pattern) -> float:
    """Sum of the scores that N:M keeps where the columns stand in `order`."""
    groups = score[:, order].reshape(len(score), -1, pattern.m)
    return float(groups.topk(pattern.n, dim=-1).values.sum(dtype=torch.float64))


def dealt(score: Tensor, m: int) -> Tensor:
    """Columns by falling sum of scores, dealt to the groups and back again: int64 (d_in / m, m)."""
    ranks = score.sum(0, dtype=torch.float64).argsort(descending=True, stable=True)
    rounds = ranks.reshape(m, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def _assigned(score: Tensor, order: Tensor, place: int, pattern: Pattern) -> Tensor:
    """The columns at `place` of each group of `order`, in the assignment to groups that retains most: int64 (groups,)."""
    from scipy.optimize import linear_sum_assignment

    rest = order[:, [other for other in range(pattern.m) if other != place]]
    # A column adds to a group what it has above the N-th largest of those that stay there.
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
