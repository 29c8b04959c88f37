"""Many recipes for one model, each compressed, judged and recorded: what `halfplate sweep` does.

The folder has another name than the verb, because `halfplate.sweep` is the verb.
"""

from halfplate.sweeps.carrying_out import sweep

__all__ = ["sweep"]
