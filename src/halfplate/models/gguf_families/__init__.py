"""Models in GGUF files: one table that reading and writing share."""
