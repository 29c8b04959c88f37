"""What of a model decides the memory, the disk and the time of its compression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from halfplate.calibration.collect import input_stages
from halfplate.calibration.self_text import token_nbytes
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.data_reads import without_numbers
from halfplate.models.linears import FoundLinear, find_blocks


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of values, but for `cache_nbytes`, the bytes of one token's keys and values.

    blocks: values of each decoder block. outer: of all that is outside the blocks, head: of the output embedding among them, where it is
    a tensor of its own. largest: of one tensor. ffn: the longest side of a linear. stages: d_in of every distinct input of a block's
    linears, in the order in which they are reached; of the block where these are largest.
    """

    blocks: tuple[int, ...]
    outer: int
    head: int
    largest: int
    hidden: int
    ffn: int
    vocabulary: int
    cache_nbytes: int
    stages: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return self.outer + sum(self.blocks)

    @property
    def block(self) -> int:
        """Values of the largest block."""
        return max(self.blocks)


def sizes_of(dense: PreTrainedModel, linears: list[FoundLinear]) -> ModelSizes:
    """The sizes of a model without values; linears: those that are compressed."""
    _, blocks = find_blocks(dense)
    config = dense.config.get_text_config()
    inside = [_values(block) for block in blocks]
    whole = _values(dense)
    output, embedding = dense.get_output_embeddings(), dense.get_input_embeddings()
    tied = output is None or any(parameter is embedding.weight for parameter in output.parameters())
    return ModelSizes(
        blocks=tuple(inside),
        outer=whole - sum(inside),
        head=0 if tied else _values(output),
        largest=max(parameter.numel() for parameter in dense.parameters()),
        hidden=config.hidden_size,
        ffn=max(max(linear.d_in, linear.d_out) for linear in linears),
        vocabulary=config.vocab_size,
        cache_nbytes=token_nbytes(config),
        stages=_stages(dense, linears),
    )


def _stages(dense: PreTrainedModel, linears: list[FoundLinear]) -> tuple[int, ...]:
    """The d_in of every distinct input in the block where they are largest."""
    by_block: dict[int, list[FoundLinear]] = {}
    for linear in linears:
        by_block.setdefault(linear.block, []).append(linear)
    block = max(by_block, key=lambda index: (sum(linear.d_in**2 for linear in by_block[index]), -index))
    widths = {linear.name: linear.d_in for linear in by_block[block]}
    try:
        shared = shared_inputs(dense, {block: list(widths)})
    # Each model class fails with errors of its own where it asks for values that are not there; then none is taken to be shared.
    except Exception:
        return tuple(widths.values())
    return tuple(widths[stage[0]] for stage in shared)


def shared_inputs(dense: PreTrainedModel, names: dict[int, list[str]]) -> list[list[str]]:
    """The linears `names` of each block by the input that they share, found by a run without any numbers."""
    with without_numbers(dense):
        blockwise = BlockwiseModel(dense)
        batch = blockwise.embed(torch.zeros(1, 2, dtype=torch.int64, device="meta"))
        stages = {block: input_stages(blockwise, block, batch, inside) for block, inside in names.items()}
    return [stage for block in stages for stage in stages[block]]


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
