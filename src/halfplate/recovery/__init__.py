"""Training a compressed model towards the original, with fixed masks."""
