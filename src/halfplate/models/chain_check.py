"""Check that the layers of a model, run one at a time, give the same results as the whole model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.models.blockwise import BlockInputs
from halfplate.models.handover import differing, patched
from halfplate.models.streamed import StreamedModel
from halfplate.precision import resolved

SAMPLES = 2  # number of sequences to compare, at full length because sliding windows take effect late
# Both run the same operations on the same shapes, so they agree bit for bit on a CPU. Sums on a GPU may have another order.
TOLERANCE = 1e-3
VALUES = 2**18  # number of values of each hidden state that are compared
CURE = "use a method that needs no text (magnitude, rtn), or another model"


@torch.no_grad()
def check_chain(streamed: StreamedModel, ids: Tensor, splits: str | None = None) -> None:
    """Raise HalfplateError unless every layer, run separately, gives the same output as in the whole forward pass.

    One layer is in memory at a time, and each is read twice: once for the whole forward pass and once for the chain. In the
    chain, other tokens run through every layer after these, as during calibration, so that values which a module keeps from
    its last call cannot hide an error.

    ids: int64 (samples, L); the first SAMPLES sequences are used.
    splits: the option that requires batches to be split by sample; then hidden states must begin with the samples.
    """
    ids = ids[:SAMPLES].to(streamed.device)
    expected = _whole(streamed, ids)
    vocabulary = int(streamed.model.config.get_text_config().vocab_size)
    try:
        with streamed.outer(head=False):
            others = streamed.embed((ids + 1) % vocabulary)
            inputs = _with_own_arguments(streamed.embed(ids), others)
    except HalfplateError:
        raise
    # Model code can raise any exception.
    except Exception as error:
        raise HalfplateError(_refusal(streamed, f"its layers do not run separately ({_reason(error)})")) from error
    if splits is not None and inputs.hidden.shape[:2] != ids.shape:
        raise HalfplateError(
            f"{splits}: model {type(streamed.model).__name__} has hidden states of shape {tuple(inputs.hidden.shape)} for tokens of shape "
            f"{tuple(ids.shape)}, expected (samples, length, ...); leave it out"
        )
    _compare(streamed, 0, inputs.hidden, expected[0])
    for index in range(len(streamed.blocks)):
        streamed.load_block(index)
        try:
            inputs = streamed.blockwise.run_block(index, inputs)
            others = streamed.blockwise.run_block(index, others)
        except HalfplateError:
            raise
        except Exception as error:
            raise HalfplateError(
                _refusal(streamed, f"layer {index} does not run separately from the others ({_reason(error)})")
            ) from error
        finally:
            streamed.free_block(index)
        _compare(streamed, index + 1, inputs.hidden, expected[index + 1])


def _whole(streamed: StreamedModel, ids: Tensor) -> list[Tensor]:
    """A sample of values from the input of every layer in the whole forward pass, and from the output of the last layer."""
    seen: list[Tensor] = []
    try:
        with streamed.running(held=False, with_head=False):
            streamed.blockwise.run_whole(ids, lambda _, hidden: seen.append(_some(hidden)))
    except HalfplateError:
        raise
    except Exception as error:
        name = type(streamed.model).__name__
        if resolved(streamed.blockwise.precision, streamed.device.type) == "bf16":
            raise HalfplateError(
                f"precision=bf16: model {name} fails in layer {max(0, len(seen) - 1)} ({_reason(error)}); pass --precision fp32"
            ) from error
        raise HalfplateError(
            f"model {name} fails on the calibration tokens ({_reason(error)}); check that it runs in transformers"
        ) from error
    if len(seen) != len(streamed.blocks) + 1:
        raise HalfplateError(_refusal(streamed, f"it runs {len(seen)} of its {len(streamed.blocks)} layers"))
    return seen


def _with_own_arguments(inputs: BlockInputs, others: BlockInputs) -> BlockInputs:
    """`inputs` with the arguments of `others`, except those that depend on the tokens, as during calibration."""
    reference = others.all_arguments
    found = differing(reference, inputs.all_arguments)
    arguments = [
        patched(shared, {place: tensor for (at, place), tensor in found.items() if at == block})
        for block, shared in enumerate(reference)
    ]
    return replace(inputs, arguments=arguments)


def _some(hidden: Tensor) -> Tensor:
    """About VALUES values, spread over the hidden state."""
    # An odd step selects different features of each token.
    return hidden.detach().reshape(-1)[:: hidden.numel() // VALUES | 1].float().clone()


def _compare(streamed: StreamedModel, index: int, hidden: Tensor, expected: Tensor) -> None:
    found = _some(hidden)
    if found.shape != expected.shape:
        raise HalfplateError(_refusal(streamed, f"the hidden state before layer {index} has another shape"))
    if not bool(expected.isfinite().all()):
        return  # The statistics name the linear.
    difference = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not difference <= TOLERANCE:
        what = f"layer {index - 1} gives" if index else "the embedding gives"
        raise HalfplateError(
            _refusal(
                streamed, f"{what} a different output than in the whole model (relative difference {difference:.2g})"
            )
        )


def _refusal(streamed: StreamedModel, what: str) -> str:
    return f"model {type(streamed.model).__name__} cannot be run layer by layer: {what}, so its statistics would be wrong; {CURE}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
