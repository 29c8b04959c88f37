"""Quality and speed of a model, also compared with the original model."""

from halfplate.evaluation.perplexity import evaluate, token_windows

__all__ = ["evaluate", "token_windows"]
