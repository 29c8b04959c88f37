"""vLLM's embedding and output layer, where they are stored as codes."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from halfplate.errors import HalfplateError
from halfplate.formats import NMSparse, WeightSpec
from halfplate.formats.sharding import shard
from halfplate.integrations.vllm.group import activations, hold, multiplied
from halfplate.integrations.vllm.members import Stored, add_parameters
from halfplate.kernels.linear import pack

_library = torch.library.Library("halfplate", "FRAGMENT")
_library.define("rows(Tensor ids, Tensor[] stored, str spec, ScalarType dtype) -> Tensor")


@lru_cache
def _spec(text: str) -> WeightSpec:
    return WeightSpec.from_json(json.loads(text), "table")


def _rows(ids: Tensor, stored: Sequence[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    table = _spec(spec)
    core = NMSparse.from_tensors(table, dict(zip(table.layout(), stored, strict=True)))
    return core.take(ids.reshape(-1)).dense().to(dtype).reshape(*ids.shape, table.d_in)


def _rows_shape(ids: Tensor, stored: Sequence[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty(*ids.shape, _spec(spec).d_in, dtype=dtype)


_library.impl("rows", _rows, "CPU")
torch.library.register_fake("halfplate::rows", _rows_shape, lib=_library)


class _TableMethod(QuantizeMethodBase):
    """A table (vocabulary, hidden) of codes, of which each rank has the rows that vLLM gives it.

    name, spec: of the matrix that stores it.
    stored: its tensors, shared by an embedding and the head that is tied to it.
    """

    def __init__(self, name: str, spec: WeightSpec, stored: Stored) -> None:
        self.name, self.spec, self.stored = name, spec, stored

    def create_weights(self, layer: Any, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Give `layer` one empty parameter for each stored tensor."""
        vocabulary, hidden = layer.org_vocab_size, layer.embedding_dim
        if (vocabulary, hidden) != (self.spec.d_out, self.spec.d_in) or layer.num_added_embeddings:
            raise HalfplateError(
                f"{self.name} is {self.spec.d_out} × {self.spec.d_in} in quantization_config, and vLLM's model expects {vocabulary} × {hidden} "
                f"and {layer.num_added_embeddings} further tokens; the checkpoint does not fit its config.json"
            )
        layouts = ((name, dtype) for name, (_, dtype) in self.spec.layout().items())
        add_parameters(layer, layouts, lambda part, tensor, _: self.stored.keep(part, tensor))

    def _rows_here(self, layer: Any) -> tuple[WeightSpec, dict[str, Tensor]] | None:
        """The rows of this rank; None if it has none but padding."""
        self.stored.check_complete()
        start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        if start == end:
            return None
        part = shard(self.spec, self.stored.tensors, "rows", start, end - start)
        return part.spec, part.tensors()


class HalfplateEmbeddingMethod(_TableMethod):
    """An embedding that stays in codes; rows are decoded when they are looked up."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the rows of this rank; raises HalfplateError if the checkpoint lacks a tensor."""
        found = self._rows_here(layer)
        if found is None:
            raise HalfplateError(
                f"{self.name}: a rank has no row of the vocabulary; use a smaller tensor_parallel_size"
            )
        spec, tensors = found
        layer.halfplate_spec, layer.halfplate_count = json.dumps(spec.to_json()), len(tensors)
        for place, name in enumerate(spec.layout()):
            layer.register_buffer(f"halfplate_stored_{place}", tensors[name], persistent=False)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """ids (...) to rows (..., hidden) in the dtype of the model."""
        stored = [getattr(layer, f"halfplate_stored_{place}") for place in range(layer.halfplate_count)]
        rows: Tensor = torch.ops.halfplate.rows(input_, stored, layer.halfplate_spec, layer.params_dtype)
        return rows

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Not called: vLLM's heads have a method of their own."""
        raise NotImplementedError(f"{self.name} is an embedding")


class HalfplateHeadMethod(_TableMethod):
    """An output layer on the kernels. tied: whether an embedding needs the same stored tensors."""

    def __init__(self, name: str, spec: WeightSpec, stored: Stored, tied: bool) -> None:
        super().__init__(name, spec, stored)
        self.tied = tied

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the rows of this rank; raises HalfplateError if the checkpoint lacks a tensor."""
        found = self._rows_here(layer)
        packed = [] if found is None else [pack(*found, activations())]
        if not self.tied:
            self.stored.tensors = {}
        hold(layer, packed, [] if found is None else [found[0].d_out], layer.num_embeddings_per_partition)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., hidden) to logits (..., rows of this rank), those of padding 0."""
        return multiplied(layer, x, bias)
