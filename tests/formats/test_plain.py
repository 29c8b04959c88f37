"""Which linears another form may stand for, and what stands for their weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats.plain import WeightView, is_plain_linear


class Named(nn.Linear):
    """A subclass that changes nothing."""


class Transposed(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Grouped(nn.Linear):
    def forward(self, x):
        weight = self.weight.view(2, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.reshape(-1, 2, x.shape[-1]).transpose(0, 1), weight)


class WithScale(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (nn.Linear, True),
        (Named, True),
        (Transposed, True),
        (Scaled, False),
        (Router, False),
        (Grouped, False),
        (WithScale, False),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_is_plain_that_computes_as_one(kind, plain, bias, device):
    with torch.device(device):
        module = kind(8, 12) if kind is WithScale else kind(8, 12, bias=bias)
        before = dict(module.named_parameters())
        assert is_plain_linear(module) == plain
    assert all(before[name] is parameter for name, parameter in module.named_parameters())
    assert (module.in_features, module.out_features) == (8, 12)


def test_other_modules_are_none():
    assert not is_plain_linear(nn.Embedding(4, 4))
    assert not is_plain_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def test_falcon_and_its_kind(tiny_model):
    model = tiny_model("falcon")
    module = model.transformer.h[0].self_attention.query_key_value
    assert type(module) is not nn.Linear
    assert is_plain_linear(module)


def test_a_view_answers_for_dtype_device_and_shape():
    view = WeightView((4, 6), torch.bfloat16, torch.device("cpu"))
    real = torch.zeros(4, 6, dtype=torch.bfloat16)
    for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta"):
        assert getattr(view, name) == getattr(real, name), name
    assert (view.size(), view.size(1), view.dim(), view.numel()) == (real.size(), 6, 2, 24)
    assert view.is_floating_point()
    assert not hasattr(view, "quant_state")


@pytest.mark.parametrize(
    "read",
    [
        lambda view, x: view.float(),
        lambda view, x: view.T,
        lambda view, x: view.data,
        lambda view, x: view[0],
        lambda view, x: x @ view,
        lambda view, x: view @ x,
        lambda view, x: x * view,
        lambda view, x: functional.linear(x, view),
        lambda view, x: torch.cat([x, view]),
    ],
)
def test_a_view_has_no_values(read):
    view = WeightView((6, 6), torch.float32, torch.device("cpu"))
    with pytest.raises(HalfplateError, match=r"needs the values of a weight .*restore\(model\)"):
        read(view, torch.ones(6, 6))
