"""Tuning what a compression left over, with every mask fixed."""
