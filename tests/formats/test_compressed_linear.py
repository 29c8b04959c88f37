import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from halfplate.formats import Chain, CompressedLinear, InWrapper, NMSparse, OutWrapper, WeightSpec
from halfplate.formats.linear import assembled
from halfplate.pattern import DENSE, Pattern


def random_linear(spec: WeightSpec, bias: bool, seed: int = 0) -> CompressedLinear:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(spec.d_in) % spec.pattern.m < spec.pattern.n).expand(spec.d_out, -1)
    weight = torch.randn(spec.d_out, spec.d_in, generator=generator)
    core = NMSparse.from_dense(weight, mask, spec.pattern, spec.core_dtype)
    wrappers = [
        kind.from_padded(
            torch.randn(-(-size // block), block, block, generator=generator), size, block, spec.wrapper_dtype
        )
        if block
        else None
        for kind, size, block in ((OutWrapper, spec.d_out, spec.out_block), (InWrapper, spec.d_in, spec.in_block))
    ]
    return CompressedLinear.from_weight(
        Chain.of(spec, core, *wrappers), spec, torch.randn(spec.d_out, generator=generator) if bias else None
    )


SPECS = st.sampled_from(
    [
        WeightSpec(6, 8),
        WeightSpec(6, 8, core_dtype="fp32"),
        WeightSpec(7, 12, out_block=3, in_block=8),
        WeightSpec(7, 12, out_block=1, in_block=1, wrapper_dtype="fp32"),
        WeightSpec(7, 12, core_dtype="int8", out_block=3, in_block=8, wrapper_dtype="int8"),
        WeightSpec(3, 140, core_dtype="int4", out_block=1),
        WeightSpec(3, 130, DENSE, "int8"),
        WeightSpec(3, 9, DENSE, "int4", out_block=2, in_block=5, wrapper_dtype="int8"),
        WeightSpec(3, 16, Pattern(1, 8), "fp16", out_block=8, in_block=0, wrapper_dtype="fp16"),
    ]
)


@given(SPECS, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([(4,), (2, 3), (0,)]))
@settings(max_examples=40, deadline=None)
def test_it_computes_a_linear_layer(spec: WeightSpec, bias: bool, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    linear = random_linear(spec, bias)
    x = torch.randn(*leading, spec.d_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    expected = functional.linear(
        x.double(), linear.matrix.dense(torch.float64), None if linear.bias is None else linear.bias.double()
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@given(SPECS, st.booleans())
@settings(max_examples=20, deadline=None)
def test_its_state_dict_is_the_layout_of_its_spec(spec: WeightSpec, bias: bool) -> None:
    linear = random_linear(spec, bias)
    layout = spec.layout() | ({"bias": ((spec.d_out,), torch.float32)} if bias else {})
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in linear.state_dict().items()} == layout
    assert (linear.out_features, linear.in_features) == (spec.d_out, spec.d_in)
    assert {name: tensor.data_ptr() for name, tensor in linear.stored().items()} == {
        name: tensor.data_ptr() for name, tensor in linear.state_dict().items()
    }
    assert not any(parameter.requires_grad for parameter in linear.parameters())

    again = CompressedLinear(spec, bias, bias_dtype=torch.float32)
    again.load_state_dict(linear.state_dict())
    x = torch.randn(2, spec.d_in)
    assert torch.equal(again(x), linear(x))


def test_tensors_are_shared_with_the_weight_it_wraps() -> None:
    spec = WeightSpec(4, 8)
    weight = random_linear(spec, False).matrix
    linear = CompressedLinear.from_weight(weight, spec, None)
    assert linear.weight.data_ptr() == weight.core.values.data_ptr()


def test_it_is_built_on_meta_without_memory() -> None:
    linear = CompressedLinear(WeightSpec(10**6, 10**6, out_block=16, in_block=16), True, device="meta")
    assert all(tensor.is_meta for tensor in linear.state_dict().values())


def test_a_weight_that_is_not_as_the_spec_says_is_refused() -> None:
    weight = random_linear(WeightSpec(4, 8, out_block=2), False).matrix
    with pytest.raises(RuntimeError):
        CompressedLinear.from_weight(weight, WeightSpec(4, 8, out_block=4), None)


def test_gradients_flow_through_it_and_its_parameters_can_be_tuned() -> None:
    linear = random_linear(
        WeightSpec(7, 12, out_block=3, in_block=8, core_dtype="fp32", wrapper_dtype="fp32"), True
    ).requires_grad_(True)
    x = torch.randn(3, 12, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.matrix.dense().sum(0).expand(3, -1))
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in linear.parameters())


def test_assembled_linears_give_the_same_and_are_left_as_they_were():
    model = nn.Sequential(random_linear(WeightSpec(12, 16, out_block=4, in_block=8), bias=True))
    x = torch.randn(5, 16)
    expected = model(x)
    with assembled(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)  # the bias and the parts are bf16
        assert model[0]._whole is not None
    assert model[0]._whole is None
