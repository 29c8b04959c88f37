"""Budgets: measuring the candidates of each matrix, and choosing one for each."""
