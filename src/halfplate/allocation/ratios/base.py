"""The interface of rules that decide how much each decoder layer keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor


class Ratios(ABC):
    """Decides from the original weights, and perhaps from their inputs, which share of its weights each layer keeps.

    name: its name in the registry.
    summary: one sentence.
    reads_inputs: whether `measured` needs the norms of the inputs.
    spreads: whether `kept` depends on `spread`; otherwise any layer may keep any share.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reads_inputs: ClassVar[bool] = False
    spreads: ClassVar[bool] = True

    @abstractmethod
    def measured(self, weights: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        """What the rule needs to know of a layer.

        weights: of its linears, fp32 (d_out, d_in) each. norms: of their inputs, (d_in,) each; empty unless `reads_inputs`.
        """

    @abstractmethod
    def kept(self, measured: Sequence[Tensor], sizes: Sequence[int], mean: float, spread: float) -> list[float]:
        """The share that each layer keeps, on average `mean`.

        sizes: weights of each layer. spread: half the difference between the largest and the smallest share, at most.
        """

    def score(self, measured: Tensor, kept: float) -> float:
        """The figure of a layer for the record: by default, what was measured."""
        return float(measured)
