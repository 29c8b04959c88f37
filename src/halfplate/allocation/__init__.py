"""Distributing one budget over many matrices."""

from halfplate.allocation.candidates import CHOICES, CHOSEN, candidates, fields_of, table_candidates, uneven
from halfplate.allocation.evolution import Evolution, Found, evolve
from halfplate.allocation.knapsack import Level, allocate
from halfplate.allocation.targets import TARGETS, Target

__all__ = [
    "CHOICES",
    "CHOSEN",
    "TARGETS",
    "Evolution",
    "Found",
    "Level",
    "Target",
    "allocate",
    "candidates",
    "evolve",
    "fields_of",
    "table_candidates",
    "uneven",
]
