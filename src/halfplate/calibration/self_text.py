"""Generating calibration text with the model itself, so that no data set is needed.

Calibration on self-generated text: Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization
and Pruning", 2024; for training: LLM-QAT, 2023.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfplate.calibration.decoding import Decoding, OwnDecoding
from halfplate.errors import HalfplateError
from halfplate.kernels import native

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# The model's own distribution. At lower temperatures small models repeat themselves: at 0.8, 6 % of the 8-grams that
# SmolLM2-135M-Instruct writes already occur in the 256 tokens before, compared with 0.2 % at 1.
TEMPERATURE = 1.0
# Limit for keys and values, and thereby for the number of parallel sequences, if the whole model is in memory anyway.
CACHE_BYTES = 3 * 2**29
MAX_BATCH = 64
LEAST_NATIVE = 1e-30  # its reciprocal is a number
NOT_FINITE = (
    "calibration=self: the model gives logits that are not finite, so it cannot sample text; "
    "check that its plain generation works, or pass a text file"
)


@dataclass(frozen=True)
class Start:
    """The first token of a sequence.

    kind: `bos` (the model's start token), `eos` (its end token, which separates documents if there is no start token), or
        `uniform` (a token drawn uniformly from the vocabulary; token is then None).
    """

    kind: str
    token: int | None


def find_start(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Start:
    """The start of generated text, as defined by the tokenizer, the generation config or the model config (in this order).

    The start token of a chat model may be a turn marker (SmolLM2-Instruct: `<|im_start|>`). No other token is added before the
    text. Of 64 sequences that SmolLM2-135M-Instruct starts in this way, none is the standard system prompt.
    """
    places = (tokenizer, model.generation_config, model.config, model.config.get_text_config())
    vocabulary = _vocabulary(model)

    for kind, key in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
        for place in places:
            stated = getattr(place, key, None)
            for token in stated if isinstance(stated, list) else [stated]:
                if isinstance(token, int) and 0 <= token < vocabulary:
                    return Start(kind, token)
    return Start("uniform", None)


@torch.no_grad()
def sample_text(
    model: "PreTrainedModel",
    start: Start,
    samples: int,
    seq_len: int,
    seed: int,
    temperature: float = TEMPERATURE,
    progress: Callable[[int, int], None] | None = None,
    cache_nbytes: int = CACHE_BYTES,
    decoding: Decoding | None = None,
    prefixes: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Sequences drawn from the model's own distribution, int64 (samples, seq_len) on the CPU.

    Every sequence begins with the start token. End tokens are drawn like any other, and the text continues after them, because
    the continuation is part of what the model has learnt (the next turn of a chat, the next document). A forced start token there
    would make SmolLM2-135M-Instruct loop over empty system prompts. So sequences need no padding. All random numbers are drawn
    beforehand, one per token, so the number of parallel sequences (limited by `cache_nbytes` of keys and values) changes the text
    only through rounding. The model runs as a whole, one token at a time.

    progress: called with the tokens generated so far and all tokens.
    decoding: how the model runs (see `decoding.decoding_of`); None means its own forward.
    prefixes: the first tokens of each sequence, instead of the start token; empty for those that begin with it.
    Raises HalfplateError if logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(samples, seq_len, generator=generator, dtype=torch.float64, device="cpu").to(model.device)
    ids = torch.empty(samples, seq_len, dtype=torch.int64, device=model.device)
    at_once = sequences_at_once(token_nbytes(model.config, seq_len), seq_len, cache_nbytes)
    batches = -(-samples // at_once)
    given = given_tokens(prefixes, samples, seq_len).to(model.device)
    done = 0
    decoding = decoding or OwnDecoding(model, seq_len)
    # Batches of nearly equal size, because a small last one would take almost as long as a full one.
    split = (tensor.tensor_split(batches) for tensor in (ids, chances, given))
    for rows, uniform, begun in zip(*split, strict=True):
        step = decoding.start(len(rows))
        rows[:, 0] = _first_tokens(model, start, uniform[:, 0])
        rows[:, 0] = torch.where(begun[:, 0] < 0, rows[:, 0], begun[:, 0])
        for position in range(1, seq_len):
            drawn = draw(step(rows[:, position - 1]), temperature, uniform[:, position])
            rows[:, position] = torch.where(begun[:, position] < 0, drawn, begun[:, position])
            if progress is not None:
                progress(done + len(rows) * (position + 1), samples * seq_len)
        done += rows.numel()
    return ids.cpu()


def given_tokens(prefixes: Sequence[Sequence[int]], samples: int, seq_len: int) -> Tensor:
    """The tokens of `prefixes` by sequence and position, int64 (samples, seq_len); -1 where a token is to be drawn."""
    given = torch.full((samples, seq_len), -1, dtype=torch.int64, device="cpu")
    for row, prefix in zip(given, prefixes, strict=False):
        begun = torch.tensor(list(prefix)[:seq_len], dtype=torch.int64, device="cpu")
        row[: len(begun)] = begun
    return given


def _first_tokens(model: "PreTrainedModel", start: Start, uniform: Tensor) -> Tensor:
    """The first tokens of the sequences, int64 (sequences,); nothing else precedes generated text."""
    if start.token is not None:
        return torch.full(uniform.shape, start.token, dtype=torch.int64, device=uniform.device)
    return (uniform * _vocabulary(model)).long()


def _vocabulary(model: "PreTrainedModel") -> int:
    """Rows of the embedding: the tokens that the model can read, and that are drawn."""
    return int(model.config.get_text_config().vocab_size)


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """One token per row of `logits` (sequences, vocabulary), int64 (sequences,), at `uniform` fp64 (sequences,) in [0, 1).

    Raises HalfplateError if logits are not finite.
    """
    if not native.available() or not logits.is_cpu or temperature < LEAST_NATIVE:
        return draw_by_torch(logits, temperature, uniform)
    logits, uniform = logits.to(torch.float32).contiguous(), uniform.contiguous()
    drawn = torch.empty(len(logits), dtype=torch.int64, device="cpu")
    status = native.library().halfplate_draw(
        native.address(logits, torch.float32, "logits"),
        logits.nbytes,
        *logits.shape,
        temperature,
        native.address(uniform, torch.float64, "uniform"),
        uniform.nbytes,
        drawn.data_ptr(),
        drawn.nbytes,
        torch.get_num_threads(),
    )
    native.check(status, "draw of tokens")
    if bool((drawn < 0).any()):
        raise HalfplateError(NOT_FINITE)
    return drawn


def draw_by_torch(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """The reference of `draw`: one token per row, by inverting the cumulative distribution at `uniform` fp64 in [0, 1).

    With one random number per row, this takes a tenth of the time of `torch.multinomial`, which draws one per token of the vocabulary.
    """
    cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise HalfplateError(NOT_FINITE)
    # right=True, so that a token with probability zero is never drawn.
    drawn = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)[:, 0]
    return drawn.clamp_max(logits.shape[-1] - 1)


def token_nbytes(config: "PretrainedConfig", length: int) -> int:
    """Bytes per token, rounded up, that a sequence of `length` tokens holds between two tokens in fp32.

    Measured with a model on the meta device, whatever its cache holds: keys and values (with the size and window of each layer),
    or states. If the model does not run there, the result is that of plain attention with the same number of heads.
    """
    from halfplate.calibration.cache import cache_nbytes

    try:
        return max(1, -(-cache_nbytes(config, length) // length))
    # Model code can raise any exception if it needs values on the meta device.
    except Exception:
        return _plain_token_nbytes(config.get_text_config().to_dict())


def _plain_token_nbytes(entries: dict[str, Any]) -> int:
    def number(*names: str, otherwise: int) -> int:
        found = (entries.get(name) for name in names)
        return next((value for value in found if type(value) is int and value > 0), otherwise)

    width = number("hidden_size", "n_embd", "d_model", otherwise=4096)
    heads = number("num_attention_heads", "n_head", otherwise=1)
    each = number("num_key_value_heads", otherwise=heads) * number("head_dim", otherwise=-(-width // heads))
    return 2 * number("num_hidden_layers", "n_layer", otherwise=32) * each * torch.float32.itemsize


def sequences_at_once(each_token: int, seq_len: int, cache_nbytes: int) -> int:
    """How many sequences have keys and values of at most `cache_nbytes` together; each_token: bytes per token."""
    return min(MAX_BATCH, max(1, cache_nbytes // (each_token * seq_len)))
