"""Merging experts instead of removing some. For comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfplate.models.sources import Source
from halfplate.transforms.structure.clusters import AVERAGE, clustered
from halfplate.transforms.structure.experts import OUTPUT, TOKENS, Blend, Candidates, ExpertPruning, Routes
from halfplate.transforms.structure.mixture import Mixture


@dataclass(frozen=True)
class Merging(ExpertPruning):
    """Clusters the experts of a layer by their mean outputs, and averages each cluster, weighted by the tokens of each member.

    Clusters are joined by the average distance of their members. The paper keeps the router, whose choices of any member then lead to
    the same expert; a plain model has one row for each expert, which is the average of those of the members, weighted in the same way.

    Source: HC-SMoE, arXiv 2410.08589.
    """

    name = "expert-merge"
    version = 1
    summary = "average clusters of experts with similar outputs; for comparison"

    def probe(self, source: Source, layer: int) -> Routes:
        return Routes(outputs=True)

    def statistics_nbytes(self, source: Source) -> int:
        width = int(source.config.get_text_config().hidden_size)
        return super().statistics_nbytes(source) + 4 * Mixture.of(source).experts * width

    def blends(self, candidates: Candidates, count: int) -> list[Blend]:
        outputs, tokens = candidates.of(OUTPUT), candidates.of(TOKENS)
        found: list[Blend] = []
        for cluster in clustered(torch.cdist(outputs, outputs), count, AVERAGE):
            shares = tokens[cluster]
            # Experts that no token reaches have no say, unless all are such.
            shares = shares / shares.sum() if bool(shares.any()) else torch.full_like(shares, 1 / len(cluster))
            found.append(dict(zip(cluster, shares.tolist(), strict=True)))
        return found


MERGING = Merging()
