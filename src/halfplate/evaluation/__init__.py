"""How far a compressed model is from text and from its original model."""

from halfplate.evaluation.perplexity import evaluate, token_windows

__all__ = ["evaluate", "token_windows"]
