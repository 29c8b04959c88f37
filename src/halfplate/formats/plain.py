"""What a plain linear is, and what stands for the weight of one that is stored in another form."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` computes x Wᵀ + bias from its `weight` and `bias` and nothing else, so that another form may stand in its place.

    A subclass of nn.Linear with a forward of its own is one if that forward gives the same on a small matrix.
    """
    if not isinstance(module, nn.Linear) or module._parameters.keys() != {"weight", "bias"}:
        return False
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Run the forward of the class of `module` with another, small matrix in place of its own."""
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
    # The forward of another class fails in ways of its own on what it does not expect.
    except Exception:
        return False
    expected = functional.linear(x, weight, bias)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


class NoValues(HalfplateError, AttributeError):
    """Raised where the values of a weight are asked for that exists in kernel layout only."""


class WeightView:
    """What code of a model may ask of the weight of a linear that is stored in another form: dtype, device and shape.

    dtype: the element type that the linear computes in. Raises NoValues where values are asked for.
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
        """Two."""
        return self.ndim

    def numel(self) -> int:
        """The number of weights."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """True."""
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
