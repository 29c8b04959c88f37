"""STUN, its structured half: experts that behave alike are pruned to one of each cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfplate.transforms.structure.clusters import COMPLETE, clustered
from halfplate.transforms.structure.experts import TOKENS, Blend, Candidates, ExpertPruning


@dataclass(frozen=True)
class Stun(ExpertPruning):
    """Clusters the experts of a layer, and keeps of each cluster the one that is nearest to its mean.

    Experts are as far from each other as their rows of the router, and clusters as their farthest members. The paper can also count
    tokens that go to both experts as nearness; where some experts are chosen for most tokens, that joins the ones that matter most, and it
    was far worse on a mixture of ours (RESULTS.md). Its threshold for all layers is found by search; here every layer keeps as many
    experts, because a plain configuration has one number. Its second half is an ordinary compression of the result, e.g. with wanda.

    Source: STUN, arXiv 2409.06211, section 4.
    """

    name = "stun"
    version = 1
    summary = "keep one expert of each cluster of similar ones; then prune weights with `compress`"

    def blends(self, candidates: Candidates, count: int) -> list[Blend]:
        router = candidates.router()
        clusters = clustered(torch.cdist(router, router), count, COMPLETE)
        return [{number: 1.0} for number in sorted(nearest(candidates, cluster) for cluster in clusters)]


def nearest(candidates: Candidates, cluster: list[int]) -> int:
    """The member of a cluster whose weights are nearest to their mean; of two, which both are as near, the one with more tokens."""
    if len(cluster) < 3:
        tokens = candidates.of(TOKENS)
        return max(cluster, key=lambda number: (float(tokens[number]), -number))
    mean: list[Tensor] = []
    for number in cluster:  # one expert in memory at a time
        found = candidates.weights(number)
        mean = found if not mean else [total.add_(one) for total, one in zip(mean, found, strict=True)]

    def distance(number: int) -> float:
        pairs = zip(candidates.weights(number), mean, strict=True)
        return sum(float((one - total / len(cluster)).square().sum()) for one, total in pairs)

    return min(cluster, key=distance)


STUN = Stun()
