"""Numerics that several methods share. They work on tensors and patterns, and do not depend on formats, models or files."""
