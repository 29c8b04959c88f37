"""Encoding of stored numbers as packed bits."""
