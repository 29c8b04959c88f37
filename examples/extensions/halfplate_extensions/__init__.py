"""Example extensions of Halfplate in a separate package; docs/extending.md explains them."""
