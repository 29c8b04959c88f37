"""Solvers for W ≈ A · S · B with a sparse core S between block-diagonal wrappers (arXiv 2510.05528)."""
