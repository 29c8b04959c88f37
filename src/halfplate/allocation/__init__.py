"""One budget over many matrices."""

from halfplate.allocation.knapsack import Level, allocate

__all__ = ["Level", "allocate"]
