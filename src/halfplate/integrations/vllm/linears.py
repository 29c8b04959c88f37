"""vLLM's linears, single or fused, on Halfplate's kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.formats.sharding import Axis, check_shards, shard
from halfplate.integrations.vllm.members import Stored, add_parameters
from halfplate.kernels.linear import pack
from halfplate.kernels.operators import linears
from halfplate.pattern import DENSE

PLACES: Mapping[Any, int] = {"q": 0, "k": 1, "v": 2, None: 0}  # of vLLM's shard ids that are not numbers


class Group:
    """The matrices of one layer of vLLM on one rank: each is cut and packed by itself, so that they may differ in everything.

    A matrix that is not compressed is packed in the element type of the model.

    layer: of vLLM, with its rank.
    specs: by the names of the matrices; None for one that is not compressed.
    sizes: outputs of each matrix on this rank.
    inputs: on this rank, and of the whole matrices.
    dtype: of the model.
    """

    def __init__(
        self,
        layer: nn.Module,
        specs: Mapping[str, WeightSpec | None],
        sizes: list[int],
        inputs: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.here, whole = inputs
        # Along which other ranks have other parts of the same matrices.
        self.axis: Axis = "rows" if self.here == whole else "columns"
        self.rank, self.ranks, self.sizes = *_rank(layer), sizes
        plain = next(name for name, stored in STORED.items() if stored == dtype)
        self.members = []
        for place, ((name, spec), size) in enumerate(zip(specs.items(), sizes, strict=True)):
            copies = int(getattr(layer, "num_kv_head_replicas", 1)) if place else 1
            parts = self.ranks // copies if self.axis == "rows" else 1
            found = spec or WeightSpec(size * parts, whole, DENSE, plain)
            self.members.append(Stored(name, found))
            self._check(found, name, size, whole)

    def _check(self, spec: WeightSpec, name: str, size: int, whole: int) -> None:
        if spec.d_in != whole or spec.d_out % size:
            raise HalfplateError(
                f"{name} is {spec.d_out} × {spec.d_in} in quantization_config, and vLLM's model expects {size} outputs on each of "
                f"{self.ranks} ranks and {whole} inputs; the checkpoint does not fit its config.json, or tensor_parallel_size does not divide it"
            )
        if spec.in_shared is not None and spec.in_shared not in (member.name for member in self.members):
            raise HalfplateError(
                f"{name} shares the wrapper of {spec.in_shared}, which vLLM does not join with it; compress without --share-wrappers"
            )
        check_shards(spec, self.axis, size if self.axis == "rows" else self.here, name)

    def keep(self, part: str, tensor: Tensor, shard_id: Any) -> None:
        """Take one loaded tensor of the matrix that vLLM calls `shard_id`."""
        member = self.members[PLACES.get(shard_id, shard_id)]
        if part == "weight" and tensor.dim() == 2 and member.spec.pattern.is_dense and tensor.is_floating_point():
            tensor = tensor.to(STORED[member.spec.core_dtype])[None]  # a matrix that is not compressed
        member.keep(part, tensor)

    @property
    def complete(self) -> bool:
        return all(member.missing is None for member in self.members)

    def packed(self) -> list[Tensor]:
        """The matrices of this rank in kernel layout; their stored tensors are dropped."""
        stored = {member.name: member.tensors for member in self.members}
        found = []
        for member, size in zip(self.members, self.sizes, strict=True):
            spec = member.spec
            tensors = dict(member.tensors)
            if spec.in_shared is not None:
                tensors |= {name: stored[spec.in_shared][name] for name in spec.borrowed}
            found.append(self._pack(member.name, spec, tensors, size))
        for member in self.members:
            member.tensors = {}
        return found

    def _pack(self, name: str, spec: WeightSpec, tensors: Mapping[str, Tensor], size: int) -> Tensor:
        if self.axis == "columns":
            start, size = self.rank * self.here, self.here
        else:
            # Heads of k and v that are fewer than the ranks are on several of them.
            start = self.rank * (spec.d_out // size) // self.ranks * size
        part = shard(spec, tensors, self.axis, start, size)
        try:
            return pack(part.spec, part.tensors())
        except HalfplateError as error:
            raise HalfplateError(f"{name}: {error}") from None


def _rank(layer: Any) -> tuple[int, int]:
    """Rank of a layer, and of how many; all have the same if the layer is not cut."""
    return (0, 1) if getattr(layer, "disable_tp", False) else (int(layer.tp_rank), int(layer.tp_size))


class HalfplateLinearMethod(LinearMethodBase):
    """A linear of vLLM, all of whose matrices are multiplied in one call of an operator.

    prefix: the name of the layer in vLLM's model.
    specs: of its matrices, by their names; None for one that is not compressed.
    """

    def __init__(self, prefix: str, specs: Mapping[str, WeightSpec | None]) -> None:
        self.prefix, self.specs = prefix, specs

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give `layer` one empty parameter for each stored tensor; raises HalfplateError if a rank's part cannot be cut out."""
        sizes = list(output_partition_sizes)
        if len(self.specs) == 1 and len(sizes) > 1:
            if _rank(layer)[1] > 1:
                raise HalfplateError(
                    f"{self.prefix} is one matrix in the checkpoint and {len(sizes)} for vLLM, so that ranks cannot have parts of each; "
                    "use tensor_parallel_size=1"
                )
            sizes = [sum(sizes)]
        group = Group(layer, self.specs, sizes, (input_size_per_partition, input_size), params_dtype)
        layouts = {name: dtype for member in group.members for name, (_, dtype) in member.spec.layout().items()}

        def keep(part: str, tensor: Tensor, shard_id: Any) -> None:
            group.keep(part, tensor, shard_id)
            if group.complete:
                # At once, so that the stored tensors of one layer only are in memory.
                hold(layer, group.packed(), sizes, sum(sizes))

        add_parameters(layer, layouts.items(), keep)
        layer.halfplate = group

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise HalfplateError if the checkpoint lacks a tensor of the layer."""
        if not hasattr(layer, "halfplate_sizes"):
            for member in layer.halfplate.members:  # type: ignore[union-attr]
                member.check_complete()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., d_in) to (..., sum of the outputs) in the dtype of `x`."""
        return multiplied(layer, x, bias)


def multiplied(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """The products of x (..., d_in) with the packed matrices of `layer`, side by side, plus the bias."""
    sizes: list[int] = layer.halfplate_sizes  # type: ignore[assignment]
    packed = [getattr(layer, f"halfplate_packed_{place}") for place in range(len(sizes))]
    y = linears(x, packed, sizes, layer.halfplate_width)  # type: ignore[arg-type]
    return y if bias is None else y + bias.to(y.dtype)


def hold(layer: nn.Module, packed: list[Tensor], sizes: list[int], width: int) -> None:
    """Put packed matrices into `layer`, for `multiplied`; outputs after theirs, up to `width`, are 0."""
    for place, matrix in enumerate(packed):
        layer.register_buffer(f"halfplate_packed_{place}", matrix, persistent=False)
    layer.halfplate_sizes, layer.halfplate_width = sizes, width
