"""Distributing one budget over many matrices."""

from halfplate.allocation.candidates import CHOICES, CHOSEN, candidates, table_candidates, uneven
from halfplate.allocation.evolution import Evolution, Found, evolve
from halfplate.allocation.knapsack import Level, allocate

__all__ = [
    "CHOICES",
    "CHOSEN",
    "Evolution",
    "Found",
    "Level",
    "allocate",
    "candidates",
    "evolve",
    "table_candidates",
    "uneven",
]
