"""How many calibration tokens each expert received, in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median


def tokens_per_expert(tokens: Mapping[str, float | None]) -> dict[str, float]:
    """Summary of the tokens of each matrix by its name, None outside experts; empty without experts.

    `experts` is their number, `median`, `least` and `most` are tokens, and `none` is the number of experts that no token reached.
    """
    # The matrices of an expert have the same tokens.
    experts = {name.rpartition(".")[0]: count for name, count in tokens.items() if count is not None}
    if not experts:
        return {}
    counts = sorted(experts.values())
    return {
        "experts": len(counts),
        "median": median(counts),
        "least": counts[0],
        "most": counts[-1],
        "none": sum(count == 0 for count in counts),
    }


def in_words(found: Mapping[str, float]) -> str:
    """The summary as text, e.g. `median 512, least 0, most 4,096; 3 of 128 experts none`."""
    text = ", ".join(f"{key} {found[key]:,.0f}" for key in ("median", "least", "most"))
    return f"{text}; {found['none']:,} of {found['experts']:,} experts none"
