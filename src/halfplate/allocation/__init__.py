"""One budget over many matrices."""

from halfplate.allocation.candidates import CHOICES, candidates, uneven
from halfplate.allocation.knapsack import Level, allocate

__all__ = ["CHOICES", "Level", "allocate", "candidates", "uneven"]
