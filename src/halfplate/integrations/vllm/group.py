"""The matrices of one linear of vLLM on one rank: what is loaded of them, and their products. Does not import vLLM."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.formats.sharding import Axis, check_shards, shard
from halfplate.integrations.vllm.members import Stored
from halfplate.kernels.linear import ACTIVATIONS, pack
from halfplate.kernels.operators import linears
from halfplate.pattern import DENSE

VARIABLE = "HALFPLATE_ACTIVATIONS"
PLACES: Mapping[Any, int] = {"q": 0, "k": 1, "v": 2, None: 0}  # of vLLM's shard ids that are not numbers


class Group:
    """The matrices of one linear of vLLM on one rank. Each is cut and packed by itself, so that they may differ in everything.

    A matrix that is not compressed is packed in the element type of the model.

    layer: of vLLM, with its rank.
    specs: by the names of the matrices; None for one that is not compressed.
    sizes: outputs of each matrix on this rank.
    inputs: on this rank, and of the whole matrices.
    dtype: of the model.
    Raises HalfplateError if the part of a rank cannot be cut out.
    """

    def __init__(
        self,
        layer: Any,
        specs: Mapping[str, WeightSpec | None],
        sizes: Sequence[int],
        inputs: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.here, whole = inputs
        # Along which other ranks have other parts of the same matrices.
        self.axis: Axis = "rows" if self.here == whole else "columns"
        self.rank, self.ranks = _rank(layer)
        self.sizes = [sum(sizes)] if len(specs) == 1 else list(sizes)
        if len(self.sizes) < len(sizes) and self.ranks > 1:
            raise HalfplateError(
                f"{next(iter(specs))} is one matrix in the checkpoint and {len(sizes)} for vLLM, so that ranks cannot have parts of each; "
                "use tensor_parallel_size=1"
            )
        plain = next(name for name, stored in STORED.items() if stored == dtype)
        self.members: list[Stored] = []
        for place, ((name, spec), size) in enumerate(zip(specs.items(), self.sizes, strict=True)):
            # Heads of k and v that are fewer than the ranks are on several of them.
            copies = int(getattr(layer, "num_kv_head_replicas", 1)) if place else 1
            d_out = size * (self.ranks // copies if self.axis == "rows" else 1)
            found = spec or WeightSpec(d_out, whole, DENSE, plain)
            self.members.append(Stored(name, found))
            self._check(found, name, (d_out, whole), size)

    def _check(self, spec: WeightSpec, name: str, shape: tuple[int, int], size: int) -> None:
        if (spec.d_out, spec.d_in) != shape:
            raise HalfplateError(
                f"{name} is {spec.d_out} × {spec.d_in} in quantization_config, and vLLM's model expects {shape[0]} × {shape[1]}; "
                "the checkpoint does not fit its config.json"
            )
        if spec.in_shared is not None and spec.in_shared not in (member.name for member in self.members):
            raise HalfplateError(
                f"{name} shares the wrapper of {spec.in_shared}, which vLLM does not join with it; compress without --share-wrappers"
            )
        check_shards(spec, self.axis, size if self.axis == "rows" else self.here, name)

    @property
    def layouts(self) -> dict[str, torch.dtype]:
        """The element type of each stored tensor, by its name below the module."""
        return {name: dtype for member in self.members for name, (_, dtype) in member.spec.layout().items()}

    def keep(self, part: str, tensor: Tensor, shard_id: Any) -> None:
        """Take one loaded tensor of the matrix that vLLM calls `shard_id`."""
        member = self.members[PLACES.get(shard_id, shard_id)]
        if part == "weight" and tensor.dim() == 2 and member.spec.pattern.is_dense and tensor.is_floating_point():
            tensor = tensor.to(STORED[member.spec.core_dtype])[None]  # a matrix that is not compressed
        member.keep(part, tensor)

    @property
    def complete(self) -> bool:
        """Whether every tensor has been loaded."""
        return all(member.missing is None for member in self.members)

    def packed(self) -> list[Tensor]:
        """The matrices of this rank in kernel layout; their stored tensors are dropped."""
        loaded = {member.name: member.tensors for member in self.members}
        found = []
        for member, size in zip(self.members, self.sizes, strict=True):
            spec, tensors = member.spec, dict(member.tensors)
            if spec.in_shared is not None:
                tensors |= {name: loaded[spec.in_shared][name] for name in spec.borrowed}
            found.append(self._pack(member.name, spec, tensors, size))
        for member in self.members:
            member.tensors = {}
        return found

    def _pack(self, name: str, spec: WeightSpec, tensors: Mapping[str, Tensor], size: int) -> Tensor:
        if self.axis == "columns":
            start, size = self.rank * self.here, self.here
        else:
            start = self.rank * (spec.d_out // size) // self.ranks * size
        part = shard(spec, tensors, self.axis, start, size)
        try:
            return pack(part.spec, part.tensors(), activations())
        except HalfplateError as error:
            raise HalfplateError(f"{name}: {error}") from None


def activations() -> str:
    """How cores take activations, of the variable HALFPLATE_ACTIVATIONS; raises HalfplateError for a value other than auto (default), float and int8."""
    found = os.environ.get(VARIABLE) or "auto"
    if found not in ACTIVATIONS:
        raise HalfplateError(
            f"{VARIABLE}={found!r} is not one of {', '.join(ACTIVATIONS)}; set one of them, or leave it unset"
        )
    return found


def _rank(layer: Any) -> tuple[int, int]:
    """Rank of a layer, and of how many; 0 of 1 if the layer is not cut."""
    return (0, 1) if getattr(layer, "disable_tp", False) else (int(layer.tp_rank), int(layer.tp_size))


def hold(layer: Any, packed: Sequence[Tensor], sizes: Sequence[int], width: int) -> None:
    """Put packed matrices into `layer`, for `multiplied`; outputs after theirs, up to `width`, are 0."""
    for place, matrix in enumerate(packed):
        layer.register_buffer(f"halfplate_packed_{place}", matrix, persistent=False)
    layer.halfplate_sizes, layer.halfplate_width = list(sizes), width


def multiplied(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """The products of x (..., d_in) with the packed matrices of `layer`, side by side, plus the bias, in the dtype of `x`."""
    packed = [getattr(layer, f"halfplate_packed_{place}") for place in range(len(layer.halfplate_sizes))]
    y = linears(x, packed, layer.halfplate_sizes, layer.halfplate_width)
    return y if bias is None else y + bias.to(y.dtype)
