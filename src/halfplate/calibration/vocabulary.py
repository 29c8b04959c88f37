"""Checking that a model has an embedding for every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of tokens that the model can read: the rows of its embedding."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        rows = None
    return int(model.config.get_text_config().vocab_size if rows is None else rows)


def check_tokens(
    ids: Tensor | list[int], model: PreTrainedModel, where: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise HalfplateError if `ids` contain a token without an embedding in the model, naming the token and its text.

    where: the source of the tokens, such as `prompt` or `text='a.txt'`.
    """
    found, vocabulary = torch.as_tensor(ids, dtype=torch.int64, device="cpu"), vocabulary_of(model)
    beyond = found[(found >= vocabulary) | (found < 0)]
    if not len(beyond):
        return
    token = int(beyond[0])
    raise HalfplateError(
        f"{where} holds token {token}{_spoken(token, tokenizer)}, but the model has a vocabulary of {vocabulary} (tokens 0 to "
        f"{vocabulary - 1}); use the model's own tokenizer, or remove this token from the text"
    )


@contextmanager
def checking_tokens(model: Any, tokenizer: Any, where: str) -> Iterator[None]:
    """Context manager that applies `check_tokens` to every input of the model, for other code that makes the tokens."""
    if check_tokenizer(tokenizer, vocabulary_of(model)) is None:
        yield
        return

    def check(_: Any, args: tuple[Tensor, ...]) -> None:
        check_tokens(args[0], model, where, tokenizer)

    hook = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def check_tokenizer(tokenizer: Any, vocabulary: int) -> str | None:
    """A warning if the tokenizer has tokens beyond the vocabulary of the model, else None."""
    beyond = sorted((token, text) for text, token in tokenizer.get_vocab().items() if token >= vocabulary)
    if not beyond:
        return None
    named = ", ".join(f"{token} ({text!r})" for token, text in beyond[:3])
    return (
        f"the tokenizer has {len(beyond)} tokens beyond the model's vocabulary of {vocabulary}: {named}; "
        "text that holds one cannot be read"
    )


def _spoken(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    try:
        text = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
    # Tokenizers can raise any exception for unknown tokens.
    except Exception:
        return ""
    return "" if text is None else f" ({text!r})"
