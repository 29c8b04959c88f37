"""Perplexity, KL divergence and agreement with an original model, over windows of tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfplate.calibration.documents import Text, token_stream
from halfplate.calibration.text import check_seq_len, shorter
from halfplate.calibration.vocabulary import check_tokens, vocabulary_of
from halfplate.errors import HalfplateError
from halfplate.headroom import check_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens in one forward pass: logits of 2,048 tokens over a vocabulary of 50,000 take 400 MB. A longer window runs alone.
TOKENS_AT_ONCE = 1024
# Rows of logits in fp64 at once. So few stay in the cache, which is four times faster than 128.
ROWS_AT_ONCE = 8
# Above this KL to its original, SmolLM2 no longer writes sentences (RESULTS.md: Wanda with 2:4).
NONSENSE_KL = 1.5


def token_windows(
    tokenizer: "PreTrainedTokenizerBase", documents: list[str] | Text, seq_len: int, windows: int | None = None
) -> Tensor:
    """The first `windows` (None: all) non-overlapping windows of the joined documents: int64 (n, seq_len).

    Documents are joined by blank lines and tokenised as one stream. No start token is added except by the tokenizer. Text is
    only read as far as needed. Raises HalfplateError for invalid numbers, and if the text has fewer windows than requested.
    """
    if seq_len < 2:
        raise HalfplateError(f"seq_len={seq_len} leaves nothing to predict, expected at least 2 tokens; try 1024")
    if windows is not None and windows < 1:
        raise HalfplateError(f"windows={windows} is too few, expected at least 1; try 16, or leave it out for all")
    stream = token_stream(tokenizer, documents, None if windows is None else windows * seq_len)
    count = len(stream) // seq_len
    wanted = windows or max(1, count)
    if count < wanted:
        passed_over = documents.spoken_facts() if isinstance(documents, Text) else ""
        raise HalfplateError(
            f"windows={wanted} of seq_len={seq_len} need {wanted * seq_len} tokens, but the text has {len(stream)} "
            f"({count} windows){passed_over}; pass a longer text, or {shorter('windows', count, len(stream))}"
        )
    return stream[: wanted * seq_len].view(wanted, seq_len)


def evaluate(
    model: "PreTrainedModel",
    windows: Tensor,
    against: "PreTrainedModel | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Measure `model` on `windows` int64 (n, L), each of which scores L - 1 tokens, also compared with the original model `against`.

    Keys: perplexity (exp of the mean negative log-likelihood), tokens (scored), windows, seq_len; and with `against`:
    kl (KL(original ‖ model), mean nats per token over the full vocabulary), top1_agreement (share of tokens for which both
    models have the same most likely token) and dense_perplexity. A ruined model gives inf or nan, which the command line
    writes to JSON as null. Log-probabilities are fp64, because the KL of a nearly equal model is below the rounding of fp32.

    progress: called with the windows done and all windows.
    Raises HalfplateError for windows that the model cannot read, and for models with different vocabularies.
    """
    _check_windows(model, windows)
    sums = _Sums()
    done = 0
    with torch.inference_mode():
        for batch in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
            logits = _logits(model, batch)
            dense = None if against is None else _logits(against, batch)
            _add_batch(sums, logits, dense, batch[:, 1:].flatten())
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    result: dict[str, float] = {
        "perplexity": _perplexity(sums.nll, tokens),
        "tokens": tokens,
        "windows": windows.shape[0],
        "seq_len": windows.shape[1],
    }
    if against is not None:
        result |= sums.against(tokens)
    return result


def compare(logits: Tensor, dense: Tensor, targets: Tensor) -> dict[str, float]:
    """kl, top1_agreement, perplexity and dense_perplexity, as in `evaluate`, from given logits.

    logits, dense: (tokens, vocabulary), of the model and of the original.
    targets: the true next tokens, int64 (tokens,).
    """
    sums = _Sums()
    _add_batch(sums, logits, dense, targets)
    return sums.against(len(targets)) | {"perplexity": _perplexity(sums.nll, len(targets))}


@dataclass
class _Sums:
    """Sums over scored tokens: negative log-likelihoods and KL in nats, and the number of agreeing tokens."""

    nll: float = 0.0
    dense_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def against(self, tokens: int) -> dict[str, float]:
        """The measurements against the original model, over all `tokens`."""
        return {
            "kl": self.kl / tokens,
            "top1_agreement": self.agreed / tokens,
            "dense_perplexity": _perplexity(self.dense_nll, tokens),
        }


def _check_windows(model: "PreTrainedModel", windows: Tensor) -> None:
    if windows.ndim != 2 or not len(windows):
        raise HalfplateError(f"windows of shape {tuple(windows.shape)}, expected (windows, seq_len) with at least one")
    check_seq_len(model, windows.shape[1], least=2)
    check_logits_fit(model, windows.shape[1])
    check_tokens(windows, model, "the text")


def check_logits_fit(model: "PreTrainedModel", seq_len: int) -> None:
    """Raise HalfplateError if the logits of one window, in fp32, would not fit into the free memory."""
    nbytes = torch.float32.itemsize * seq_len * vocabulary_of(model)
    check_memory(f"the logits of seq_len={seq_len} tokens", nbytes, "seq_len", seq_len)


def _logits(model: "PreTrainedModel", batch: Tensor) -> Tensor:
    """Logits of the scored tokens of `batch` (n, L): (n * (L - 1), vocabulary)."""
    logits: Tensor = model(input_ids=batch.to(model.device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def _add_batch(sums: _Sums, logits: Tensor, dense: Tensor | None, targets: Tensor) -> None:
    """Add the measurements of logits and original logits (tokens, vocabulary) for the true tokens `targets` (tokens,)."""
    if dense is not None and dense.shape != logits.shape:
        raise HalfplateError(
            f"against: the original model has a vocabulary of {dense.shape[-1]}, the model one of {logits.shape[-1]}; "
            "pass the original model that this one was made from"
        )
    targets = targets.to(logits.device)
    for first in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        # (rows, vocabulary)
        log_p = logits[rows].double().log_softmax(-1)
        truth = targets[rows, None]
        sums.nll -= log_p.gather(1, truth).sum().item()
        if dense is None:
            continue
        dense_log_p = dense[rows].to(log_p).log_softmax(-1)
        sums.dense_nll -= dense_log_p.gather(1, truth).sum().item()
        sums.kl += (dense_log_p.exp() * (dense_log_p - log_p)).sum().item()
        sums.agreed += int((dense_log_p.argmax(-1) == log_p.argmax(-1)).sum())


def _perplexity(nll: float, tokens: int) -> float:
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
