"""Numerics that several methods share; they know tensors and patterns, nothing of formats, models or files."""
