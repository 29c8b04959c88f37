"""Hierarchical clustering of experts by their distances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The distance of two clusters from the distances of their members, (n, m).
COMPLETE: Callable[[Tensor], Tensor] = torch.amax
AVERAGE: Callable[[Tensor], Tensor] = torch.mean


def clustered(distances: Tensor, count: int, linkage: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """Join the two nearest clusters until `count` are left; of equal distances the first. Each is ascending, and they are in the order of their first.

    distances: (n, n), symmetric; the diagonal does not matter.
    linkage: COMPLETE, by which the distance of two clusters is that of their farthest members, or AVERAGE.
    """
    clusters = [[member] for member in range(len(distances))]
    between = distances.double().clone().fill_diagonal_(torch.inf)
    while len(clusters) > count:
        first, second = divmod(int(between.argmin()), len(clusters))
        first, second = min(first, second), max(first, second)
        clusters[first] = sorted(clusters[first] + clusters.pop(second))
        left = [row for row in range(len(between)) if row != second]
        between = between[left][:, left]
        for other, members in enumerate(clusters):
            if other != first:
                distance = linkage(distances[clusters[first]][:, members].double())
                between[first, other] = between[other, first] = distance
    return sorted(clusters)
