"""Encoding of stored numbers: packed bits, rounded values and codes."""
