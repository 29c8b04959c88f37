"""The checkpoint format (docs/format.md): writing, checking, loading through transformers, export to a model of full size."""
