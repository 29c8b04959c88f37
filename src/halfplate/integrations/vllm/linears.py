"""vLLM's linears, single or fused, on Halfplate's kernels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from halfplate.formats import WeightSpec
from halfplate.integrations.vllm.group import Group, hold, multiplied
from halfplate.integrations.vllm.members import add_parameters


class HalfplateLinearMethod(LinearMethodBase):
    """A linear of vLLM, all of whose matrices are multiplied in one call of an operator.

    specs: of its matrices, by their names; None for one that is not compressed.
    """

    def __init__(self, specs: Mapping[str, WeightSpec | None]) -> None:
        self.specs = specs

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give `layer` one empty parameter for each stored tensor; raises HalfplateError if a rank's part cannot be cut out."""
        inputs = (input_size_per_partition, input_size)
        group = Group(layer, self.specs, output_partition_sizes, inputs, params_dtype)

        def keep(part: str, tensor: Tensor, shard_id: Any) -> None:
            group.keep(part, tensor, shard_id)
            if group.complete:
                # At once, so that stored tensors do not wait in memory for those of all other layers.
                hold(layer, group.packed(), group.sizes, sum(group.sizes))

        add_parameters(layer, group.layouts.items(), keep)
        layer.halfplate_group = group

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise HalfplateError if the checkpoint lacks a tensor of the layer."""
        if not hasattr(layer, "halfplate_sizes"):
            for member in layer.halfplate_group.members:
                member.check_complete()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., d_in) to (..., sum of the outputs) in the dtype of `x`."""
        return multiplied(layer, x, bias)
