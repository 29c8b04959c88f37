"""The stored tensors of one matrix, while vLLM loads them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec

Keep = Callable[[str, Tensor, Any], None]


class Stored:
    """What has been loaded of the matrix `name`; tensors of other shapes or types than `spec` says are refused.

    tensors: by their name below the module.
    """

    def __init__(self, name: str, spec: WeightSpec) -> None:
        self.name, self.spec = name, spec
        self.tensors: dict[str, Tensor] = {}

    def keep(self, part: str, tensor: Tensor) -> None:
        """Keep one tensor; raises HalfplateError if it is not one of this matrix."""
        layout = self.spec.layout()
        if part not in layout:
            raise HalfplateError(
                f"{self.name}.{part} does not belong to a {self.spec.format} matrix; copy or write the checkpoint again"
            )
        shape, dtype = layout[part]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise HalfplateError(
                f"{self.name}.{part} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape} from config.json; "
                "copy or write the checkpoint again"
            )
        self.tensors[part] = tensor.detach()

    @property
    def missing(self) -> str | None:
        """The full name of a tensor that has not been loaded; None if all have."""
        for part in self.spec.layout():
            if part not in self.tensors:
                return f"{self.name}.{part}"
        return None

    def check_complete(self) -> None:
        """Raise HalfplateError if a tensor has not been loaded."""
        if (missing := self.missing) is not None:
            raise HalfplateError(f"{missing} is missing; copy or write the checkpoint again")


def add_parameters(layer: nn.Module, layouts: Iterable[tuple[str, torch.dtype]], keep: Keep) -> None:
    """Give `layer` an empty parameter for each name, through which vLLM hands the tensors of that name to `keep`.

    keep: called with the name, the tensor, and the shard id of vLLM, None if the layer is a single matrix.
    """
    for name, dtype in layouts:
        parameter = nn.Parameter(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)
        parameter.weight_loader = _loader(name, keep)  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)


def _loader(name: str, keep: Keep) -> Callable[..., None]:
    def load(parameter: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
        # vLLM 0.32 writes the id onto the tensor; others pass it.
        keep(name, tensor, getattr(tensor, "shard_id", None) if shard_id is None else shard_id)

    return load
