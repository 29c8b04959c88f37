"""Pruning the experts that the fewest tokens are routed to. A baseline."""

from __future__ import annotations

from dataclasses import dataclass

from halfplate.transforms.structure.experts import TOKENS, Blend, Candidates, ExpertPruning
from halfplate.transforms.structure.scored import best


@dataclass(frozen=True)
class Frequency(ExpertPruning):
    """Scores an expert by the number of calibration tokens that are routed to it."""

    name = "expert-frequency"
    version = 1
    summary = "keep the experts that most tokens are routed to; a baseline"

    def blends(self, candidates: Candidates, count: int) -> list[Blend]:
        return [{number: 1.0} for number in best(candidates.of(TOKENS), count).tolist()]


FREQUENCY = Frequency()
