"""The checkpoint format (docs/format.md): writing, checking, loading through transformers, and full-size copies."""
