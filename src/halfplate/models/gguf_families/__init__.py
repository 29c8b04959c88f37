"""Supported model families of GGUF files: one table for reading and writing."""
