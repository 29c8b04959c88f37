"""Training a compressed linear: the same function before, the same mask after, every type and shape."""

import pytest
import torch
from torch import nn

from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.methods import create
from halfplate.pattern import Pattern
from halfplate.recovery.trainable import TrainableLinear, trainable
from halfplate.statistics import InputStatistics

SPECS = [
    WeightSpec(20, 24, Pattern(2, 4), "bf16", 0, 0),
    WeightSpec(20, 24, Pattern(2, 4), "bf16", 8, 8),
    WeightSpec(20, 24, Pattern(2, 4), "fp32", 1, 1, "fp32"),
    WeightSpec(20, 24, Pattern(2, 4), "int8", 8, 16, "int8"),
    WeightSpec(20, 24, Pattern(1, 4), "int4", 16, 0),
    WeightSpec(20, 24, Pattern(1, 1), "int4", 8, 8),
    WeightSpec(20, 72, Pattern(2, 4), "int4", 8, 8, group=32),
    WeightSpec(20, 72, Pattern(2, 4), "bf16", 0, 0, permuted=True),
]


def linear_of(spec, bias=True):
    weight = torch.randn(spec.d_out, spec.d_in, generator=torch.Generator().manual_seed(1))
    x = torch.randn(200, spec.d_in, generator=torch.Generator().manual_seed(2)).double()
    gram = x.T @ x / len(x)
    method = create("ria", permute=True) if spec.permuted else create("armor", iterations=2)
    solution = method.compress(weight, InputStatistics(200, gram.diagonal().float(), gram), spec)
    return CompressedLinear.from_weight(solution.weight, spec, torch.randn(spec.d_out) if bias else None)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_computes_the_same_and_goes_back_unchanged(spec):
    linear, x = linear_of(spec), torch.randn(3, 5, spec.d_in)
    trained = TrainableLinear(linear, values_too=True)
    torch.testing.assert_close(trained(x), linear(x), rtol=1e-4, atol=1e-4)
    back = trained.compressed()
    for name, tensor in linear.stored().items():
        if tensor.dtype == torch.int8 or name.endswith(("in_scales", "out_scales")):
            continue  # int8 wrappers are rounded anew, their scale rounded up
        assert torch.equal(back.stored()[name], tensor), name
    torch.testing.assert_close(back(x), linear(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_training_lowers_the_loss_and_keeps_the_mask(spec):
    linear, x = linear_of(spec), torch.randn(64, spec.d_in)
    target = linear(x) + 0.3 * x @ torch.randn(spec.d_in, spec.d_out, generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(linear)
    with trainable(model, values_too=True) as inside:
        optimizer = torch.optim.Adam([p for p in inside["0"].parameters() if p.requires_grad], lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    tuned = model[0]
    assert isinstance(tuned, CompressedLinear)
    assert not any(parameter.requires_grad for parameter in tuned.parameters())
    assert torch.equal(tuned.matrix.core.mask(), linear.matrix.core.mask())
    assert (tuned(x) - target).square().mean() < (linear(x) - target).square().mean()


def test_wrappers_alone_leave_the_core():
    linear = linear_of(SPECS[1])
    trained = TrainableLinear(linear, values_too=False)
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert names == {"OutWrapper.blocks", "OutWrapper.tail", "InWrapper.blocks"}


def test_an_exception_puts_the_linears_back():
    model = nn.Sequential(linear_of(SPECS[1]))
    before = model[0]
    with pytest.raises(KeyboardInterrupt), trainable(model, values_too=True):
        raise KeyboardInterrupt
    assert model[0] is before


@pytest.mark.parametrize("spec", [SPECS[3], SPECS[5]], ids=str)
def test_a_scale_that_falls_below_zero_is_stored_above(spec):
    linear, x = linear_of(spec), torch.randn(3, spec.d_in)
    trained = TrainableLinear(linear, values_too=True)
    with torch.no_grad():
        trained.core.values[::2] *= -1
    scales = trained.compressed().stored()["weight_scales"]
    assert bool((scales >= 0).all())
    assert torch.equal(scales, linear.stored()["weight_scales"])
    torch.testing.assert_close(trained(x), linear(x), rtol=1e-4, atol=1e-4)
