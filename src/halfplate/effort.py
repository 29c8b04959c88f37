"""How much work a compression takes, in one word."""

from dataclasses import dataclass
from typing import Literal

Effort = Literal["quick", "normal", "best"]


@dataclass(frozen=True)
class Work:
    """What an effort stands for.

    samples: calibration sequences, unless the recipe says otherwise.
    iterations, grid_iterations: of ARMOR with the full Gram matrix, unless its options say otherwise; None for its own.
    """

    samples: int
    iterations: int | None = None
    grid_iterations: int | None = None


WORK: dict[Effort, Work] = {
    "quick": Work(samples=32, iterations=8, grid_iterations=8),
    "normal": Work(samples=64),
    "best": Work(samples=128, iterations=40, grid_iterations=32),
}
