"""How much each decoder layer keeps of a common average, one file a rule.

To add one: write its file with a `Ratios`, and add a line to `RATIOS`.
"""

from halfplate.allocation.ratios.base import Ratios
from halfplate.allocation.ratios.layers import kept_of_groups, kept_ratios
from halfplate.registry import Registry

__all__ = ["RATIOS", "UNIFORM", "WELORE", "Ratios", "kept_of_groups", "kept_ratios"]

UNIFORM = "uniform"  # every layer keeps the same
WELORE = "welore"  # not a rule for layers: each matrix of method svd gets its own rank (allocation/ranks.py)

RATIOS: Registry[Ratios] = Registry(
    "ratios",
    "",
    {
        "owl": "halfplate.allocation.ratios.owl:OWL",
        "farms": "halfplate.allocation.ratios.farms:FARMS",
        "essential": "halfplate.allocation.ratios.essential:ESSENTIAL",
    },
)
