"""Structured pruning: transforms after which a model has fewer layers, heads, channels or hidden dimensions.

To add one: write its file with a `Shrinking`, and add a line to `TRANSFORMS` (`halfplate.transforms`).
"""
