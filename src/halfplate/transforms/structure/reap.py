"""REAP: the experts go that add least to the output of their layer when a token is routed to them."""

from __future__ import annotations

from dataclasses import dataclass

from halfplate.transforms.structure.experts import SALIENCY, Blend, Candidates, ExpertPruning
from halfplate.transforms.structure.scored import best


@dataclass(frozen=True)
class Reap(ExpertPruning):
    """Scores an expert by the mean, over the tokens that are routed to it, of its routing weight times the norm of its output.

    The weight is the one by which the model multiplies the output. An expert that no calibration token reaches scores 0.

    Source: REAP, arXiv 2510.13999.
    """

    name = "reap"
    version = 1
    summary = "keep the experts with the largest routing weight times output; the others go from the router, too"

    def blends(self, candidates: Candidates, count: int) -> list[Blend]:
        return [{number: 1.0} for number in best(candidates.of(SALIENCY), count).tolist()]


REAP = Reap()
