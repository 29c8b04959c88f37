"""The sizes of a model that determine the memory, disk and time of its compression."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from halfplate.calibration.collect import input_stages
from halfplate.calibration.self_text import token_nbytes
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.experts import experts_of
from halfplate.models.handover import hands_on
from halfplate.models.linears import FoundLinear, find_blocks
from halfplate.models.without_values import run_without_values

# Names that configurations give to the number of experts for each token; 2 if there is none of them.
CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "num_selected_experts",
    "top_k_experts",
)


@dataclass(frozen=True)
class ExpertSizes:
    """The experts that are compressed, of the layer where they are largest.

    layers: number of layers with experts.
    experts: their number in this layer.
    chosen: experts of a token.
    hidden, inner: values of the input of an expert, and of its down projection.
    values: weights of one expert.
    """

    layers: int
    experts: int
    chosen: int
    hidden: int
    inner: int
    values: int


# Samples and length of a placeholder text; tensors are unlikely to have other sides of these sizes.
TEXT = (3, 7)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model in numbers of values; only `cache_nbytes` is in bytes, per token in the cache of a calibration sequence.

    blocks: values of each decoder layer.
    outer, head: values outside the layers, and among them those of the output embedding, if it has its own tensor.
    largest: values of the largest tensor.
    ffn: the longest side of a linear.
    stages: d_in of every distinct input of the linears in a layer, in the order of use; of the layer where they are largest.
    beside: values per token that pass from layer to layer beyond one hidden state.
    arguments: values per token among the arguments of all layers.
    experts: those that are compressed; their inputs are not among the stages. None without experts.
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
    beside: int = 0
    arguments: int = 0
    experts: ExpertSizes | None = None

    @property
    def parameters(self) -> int:
        return self.outer + sum(self.blocks)

    @property
    def block(self) -> int:
        """Values of the largest layer."""
        return max(self.blocks)


def sizes_of(dense: PreTrainedModel, linears: list[FoundLinear], seq_len: int) -> ModelSizes:
    """The sizes of a model on the meta device; linears: those to compress; seq_len: tokens per calibration sequence."""
    _, blocks = find_blocks(dense)
    each = [_values(block) for block in blocks]
    whole = _values(dense)
    output, embedding = dense.get_output_embeddings(), dense.get_input_embeddings()
    vocabulary, hidden = embedding.weight.shape  # type: ignore[misc,union-attr]
    inside, experts = _experts(dense, linears)
    stages, between, arguments = _run_without_values(dense, [one for one in linears if one.name not in inside])
    tied = output is None or any(parameter is embedding.weight for parameter in output.parameters())
    return ModelSizes(
        blocks=tuple(each),
        outer=whole - sum(each),
        head=0 if tied else _values(output),
        largest=max(parameter.numel() for parameter in dense.parameters()),
        hidden=hidden,
        ffn=max(max(linear.d_in, linear.d_out) for linear in linears),
        vocabulary=vocabulary,
        cache_nbytes=token_nbytes(dense.config, seq_len),
        stages=stages,
        beside=max(0, between - hidden),
        arguments=arguments,
        experts=experts,
    )


def _experts(dense: PreTrainedModel, linears: list[FoundLinear]) -> tuple[set[str], ExpertSizes | None]:
    """The names of the linears of experts, and their sizes."""
    modules = experts_of(dense)
    inside = {one.name: one for one in linears if one.name.rsplit(".", 2)[0] in modules}
    if not inside:
        return set(), None
    config = dense.config.get_text_config()
    chosen = next((count for name in CHOSEN if isinstance(count := getattr(config, name, None), int)), 2)
    found = []
    for module in {name.rsplit(".", 2)[0] for name in inside}:
        expert = modules[module].expert(0)
        shapes = {leaf: expert.get_parameter(f"{leaf}.weight").shape for leaf in modules[module].layout.linears}
        hidden, inner = shapes["down_proj"]
        found.append((modules[module].layout.experts, hidden, inner, sum(map(prod, shapes.values()))))
    number, hidden, inner, values = max(found, key=lambda sizes: sizes[0] * sizes[3])
    layers = len({one.block for one in inside.values()})
    return set(inside), ExpertSizes(layers, number, min(chosen, number), hidden, inner, values)


def _run_without_values(dense: PreTrainedModel, linears: list[FoundLinear]) -> tuple[tuple[int, ...], int, int]:
    """The d_in of every distinct input in the layer where they are largest, and the values per token that pass between layers."""
    by_block: dict[int, list[FoundLinear]] = {}
    if not linears:
        return (), dense.config.get_text_config().hidden_size, 0
    for linear in linears:
        by_block.setdefault(linear.block, []).append(linear)
    block = max(by_block, key=lambda index: (sum(linear.d_in**2 for linear in by_block[index]), -index))
    widths = {linear.name: linear.d_in for linear in by_block[block]}
    hidden = dense.config.get_text_config().hidden_size
    # Model code can raise any exception if it needs values on the meta device.
    try:
        with run_without_values(dense):
            blockwise, batch = _embedded(dense)
            passed = [batch]
            stages = _stages(blockwise, batch, {block: list(widths)}, passed)
            between = max(sum(map(_of_a_token, (one.hidden, *one.carried.values()))) for one in passed)
            arguments = _argument_values(batch.all_arguments)
        return tuple(widths[stage[0]] for stage in stages), between, arguments
    except Exception:
        pass
    # In this case, assume that no input is shared and that all layers equal the first one.
    try:
        with run_without_values(dense):
            first, beside = _first_inputs(dense)
        return tuple(widths.values()), _of_a_token(first), _argument_values([beside]) * len(find_blocks(dense)[1])
    except Exception:
        return tuple(widths.values()), hidden, 0


def shared_inputs(dense: PreTrainedModel, names: dict[int, list[str]]) -> list[list[str]]:
    """The linears `names` of each layer, grouped by shared input, found by a run on the meta device."""
    with run_without_values(dense, each_expert=True):
        return _stages(*_embedded(dense), names, [])


def _embedded(dense: PreTrainedModel) -> tuple[BlockwiseModel, BlockInputs]:
    blockwise = BlockwiseModel(dense)
    return blockwise, blockwise.embed(torch.zeros(TEXT, dtype=torch.int64, device="meta"))


def _stages(
    blockwise: BlockwiseModel, batch: BlockInputs, names: dict[int, list[str]], passed: list[BlockInputs]
) -> list[list[str]]:
    """`shared_inputs` of the layers from `batch` on. passed: called with the values that pass between layers, if they exceed a hidden state."""
    found = []
    carries = hands_on(batch.all_arguments)
    for block in range(max(names) + 1):
        if block in names:
            found += input_stages(blockwise, block, batch, names[block])
        if carries:
            with torch.no_grad():
                batch = blockwise.run_block(block, batch)
            passed.append(batch)
    return found


def _first_inputs(dense: PreTrainedModel) -> tuple[Tensor, Any]:
    """The hidden state and the other arguments of the first layer."""
    seen: list[Any] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Seen

    hook = find_blocks(dense)[1][0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        dense.base_model(input_ids=torch.zeros(TEXT, dtype=torch.int64, device="meta"), use_cache=False)
    except _Seen:
        pass
    finally:
        hook.remove()
    args, kwargs = seen[0]
    hidden = args[0] if args else kwargs.pop("hidden_states")
    return hidden, (args[1:], kwargs)


class _Seen(Exception):
    """Raised when the first layer has been called."""


def _argument_values(arguments: Any) -> int:
    """Values per token in tensors that have them for every token of every sample; each tensor counts once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    each = [tensor for tensor in tensors.values() if all(tensor.shape.count(side) == 1 for side in TEXT)]
    return sum(map(_of_a_token, each))


def _of_a_token(tensor: Tensor) -> int:
    """Values per token, counted as fp32."""
    return -(-tensor.numel() * tensor.element_size() // (4 * prod(TEXT)))


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
