"""How many tokens a model takes at once."""

from __future__ import annotations

from typing import Any

from torch import nn


def positions(model: Any) -> int | None:
    """The longest text that a model takes, in tokens; None if its configuration has no limit.

    In models like RoBERTa the first positions stand for padding.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return None
    table = next((module for name, module in model.named_modules() if name.endswith("position_embeddings")), None)
    if isinstance(table, nn.Embedding) and table.padding_idx is not None and table.num_embeddings == longest:
        return longest - table.padding_idx - 1
    return longest
