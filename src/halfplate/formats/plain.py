"""Recognising plain linears, and the stand-in for the weight of a packed linear."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` computes only x Wᵀ + bias from its `weight` and `bias`, so that it can be replaced.

    A subclass of nn.Linear with its own forward counts if that forward gives the same result for a small matrix.
    """
    if not isinstance(module, nn.Linear) or module._parameters.keys() != {"weight", "bias"}:
        return False
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Run the forward of the class of `module` with another, small matrix."""
    d_out, d_in = 6, 4
    weight = torch.arange(d_out * d_in, dtype=torch.float32, device="cpu").cos().view(d_out, d_in)
    bias = None if module.bias is None else weight[:, 0] + 1
    x = torch.arange(2 * 3 * d_in, dtype=torch.float32, device="cpu").sin().view(2, 3, d_in)
    small: Any = type(module).__new__(type(module))
    small.__dict__.update(module.__dict__)
    small.in_features, small.out_features = d_in, d_out
    small._parameters = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        for name, tensor in (("weight", weight), ("bias", bias))
    }
    try:
        found = type(module).forward(small, x)
    # The forward of another class can raise any exception.
    except Exception:
        return False
    expected = functional.linear(x, weight, bias)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


class NoValues(HalfplateError, AttributeError):
    """Raised if the values of a weight are read that only exists in kernel layout."""


class WeightView:
    """Stand-in for the weight of a packed linear, with dtype, device and shape.

    dtype: the element type that the linear computes in.
    Raises NoValues if values are read.
    """

    requires_grad = False
    grad = None
    is_meta = False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device
        self.ndim = len(shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the length of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of dimensions, 2."""
        return self.ndim

    def numel(self) -> int:
        """The number of weights."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Always true."""
        return self.dtype.is_floating_point

    def __getattr__(self, name: str) -> NoReturn:
        if not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise NoValues(_no_values(name))

    def __getitem__(self, index: Any) -> NoReturn:
        raise NoValues(_no_values("[...]"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise NoValues(_no_values(getattr(func, "__name__", str(func))))


def _no_values(what: str) -> str:
    return (
        f"{what} needs the values of a weight in kernel layout, which has only dtype, device and shape; "
        "call halfplate.runtime.restore(model) first, or load with kernels=False"
    )
