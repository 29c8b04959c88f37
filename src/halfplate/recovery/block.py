"""Layer tuning: training one decoder layer, with fixed masks, towards the output of the original layer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.recovery.trainable import TrainableLinear, trainable

HELD_OUT = 8  # one of this many batches is held out for validation
BATCH = 2  # sequences per step; at equal work, many small steps reach a lower error than few large ones


@dataclass(frozen=True)
class BlockTuning:
    """steps: of Adam, each on BATCH sequences.
    learning_rate: initial rate, which falls to 0 along a cosine.
    """

    steps: int
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class TunedBlock:
    """Error on held-out batches before and after tuning, relative to what the layer adds; equal if tuning gained nothing."""

    before: float
    after: float


def tune_block(
    blockwise: BlockwiseModel,
    index: int,
    inputs: Sequence[BlockInputs],
    dense: Sequence[Tensor],
    settings: BlockTuning,
) -> TunedBlock:
    """Tune wrappers and kept values of every compressed linear in layer `index`, in place.

    The error of a token is relative to what the layer adds to it, so that massive activations of a few tokens do not dominate.
    If the error on held-out batches does not fall, the layer is left unchanged.

    inputs: inputs of the layer from the compressed layers before it, in batches of any size.
    dense: outputs of the original layer for the original inputs, hidden (samples, L, d) per batch.
    """
    inputs = _Parts(inputs, [len(batch.hidden) for batch in inputs])
    dense = _Parts(dense, [len(batch) for batch in dense])
    held_out = list(range(0, len(inputs), HELD_OUT)) if len(inputs) > 1 else [0]
    training = [number for number in range(len(inputs)) if number not in held_out] or [0]
    block = blockwise.blocks[index]

    def judged() -> float:
        with torch.no_grad():
            errors = [_error(blockwise, index, inputs[number], dense[number]) for number in held_out]
        return float(torch.stack(errors).mean())

    before = judged()
    kept = dict(block.named_modules())
    with torch.enable_grad(), trainable(block, values_too=True) as linears:
        originals = {name: kept[name] for name in linears}
        groups = _groups(linears.values(), settings.learning_rate)
        if not groups:
            return TunedBlock(before, before)
        parameters = [group["params"][0] for group in groups]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(settings.seed)
        order: list[int] = []
        for step in range(settings.steps):
            if not order:
                order = [
                    training[k]
                    for k in torch.randperm(
                        len(training), generator=generator, dtype=torch.int64, device="cpu"
                    ).tolist()
                ]
            number = order.pop()
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            optimizer.zero_grad()
            _error(blockwise, index, inputs[number], dense[number]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    after = judged()
    if not after < before:
        for name, original in originals.items():
            block.set_submodule(name, original)
        after = before
    return TunedBlock(before, after)


def _groups(linears: Iterable[TrainableLinear], learning_rate: float) -> list[dict[str, Any]]:
    """The parameters, each with its peak learning rate: a step of a scale moves all its weights, in proportion to their codes."""
    return [
        {"params": [parameter], "highest": learning_rate / part.leverage}
        for linear in linears
        for part in linear.parts
        for parameter in part.parameters()
        if parameter.requires_grad
    ]


def _error(blockwise: BlockwiseModel, index: int, batch: BlockInputs, dense: Tensor) -> Tensor:
    """Mean over tokens of |output − dense|² / |dense − input|², the latter at least a tenth of its median."""
    output = blockwise.run_block(index, batch).hidden
    added = (dense - batch.hidden).square().sum(-1)  # (samples, L)
    return ((output - dense).square().sum(-1) / added.clamp_min(0.1 * float(added.median()))).mean()


class _Parts(Sequence[Any]):
    """Batches split into BATCH samples each. A batch is only read when one of its parts is needed."""

    def __init__(self, batches: Sequence[Any], sizes: Sequence[int]) -> None:
        self._batches = batches
        self._places = [(batch, part) for batch, size in enumerate(sizes) for part in range(-(-size // BATCH))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        batch, part = self._places[index]
        return self._batches[batch].split(BATCH)[part]
