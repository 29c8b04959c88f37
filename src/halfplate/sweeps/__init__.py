"""`halfplate sweep`: many recipes for one model, each compressed, measured and recorded.

The folder is not called `sweep`, because `halfplate.sweep` is the public function.
"""

from halfplate.sweeps.carrying_out import sweep

__all__ = ["sweep"]
