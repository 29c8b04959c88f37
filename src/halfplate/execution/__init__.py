"""Executors: what carries a plan out."""
