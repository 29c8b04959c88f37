"""Values that no writer leaves are refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, InWrapper, NMSparse, OutWrapper, Permutation, WeightSpec, check_stored
from halfplate.pattern import DENSE, Pattern

INT8 = WeightSpec(5, 132, core_dtype="int8", out_block=2, in_block=8, wrapper_dtype="int8")
INT4 = WeightSpec(5, 12, core_dtype="int4", out_block=2)
ODD = WeightSpec(5, 12, Pattern(1, 4), "int4")
DENSE4 = WeightSpec(3, 7, DENSE, "int4")
PERMUTED = WeightSpec(3, 40, core_dtype="int4", in_block=8, permuted=True, group=32)


def stored(spec: WeightSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(spec.d_in) % spec.pattern.m < spec.pattern.n).expand(spec.d_out, -1)
    weight = torch.randn(spec.d_out, spec.d_in, generator=generator)
    wrappers = [
        kind.from_padded(
            torch.randn(-(-size // block), block, block, generator=generator), size, block, spec.wrapper_dtype
        )
        if block
        else None
        for kind, size, block in ((OutWrapper, spec.d_out, spec.out_block), (InWrapper, spec.d_in, spec.in_block))
    ]
    core = NMSparse.from_dense(weight, mask, spec.pattern, spec.core_dtype, spec.group)
    order = Permutation.of(torch.randperm(spec.d_in, generator=generator)) if spec.permuted else None
    tensors = Chain.of(spec, core, *wrappers, order).tensors()
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "spec", [INT8, INT4, ODD, DENSE4, PERMUTED, WeightSpec(3, 8, core_dtype="fp32"), WeightSpec(3, 5, DENSE)]
)
def test_what_is_written_passes(spec: WeightSpec) -> None:
    tensors = stored(spec)
    check_stored(spec, tensors | {"bias": torch.zeros(spec.d_out)}, "up")
    check_stored(spec, {name: tensor.to("meta") for name, tensor in tensors.items()}, "up")


@pytest.mark.parametrize(
    ("spec", "part", "value", "complaint"),
    [
        (INT8, "weight", 0, "holds the code 0, expected 1 to 255"),
        (INT8, "weight_index", 0, "holds positions that do not increase"),
        (INT8, "weight_scales", -0.5, "holds -0.5, expected scales of 0 or more"),
        (INT8, "weight_scales", torch.inf, "holds NaN or inf"),
        (INT8, "weight_scales", torch.nan, "holds NaN or inf"),
        (INT8, "weight_out_scales", -1.0, "holds -1, expected scales of 0 or more"),
        (INT8, "weight_in_scales", torch.nan, "holds NaN or inf"),
        (INT8, "weight_out_blocks", -128, "holds -128, expected -127 to 127"),
        (INT8, "weight_out_tail", -128, "holds -128, expected -127 to 127"),
        (INT8, "weight_in_blocks", -128, "holds -128, expected -127 to 127"),
        (INT8, "bias", torch.nan, "holds NaN or inf"),
        (INT4, "weight_out_blocks", torch.inf, "holds NaN or inf"),
        (ODD, "weight", 0x80, "has padding bits that are not 0"),
        (DENSE4, "weight", 0x10, "has padding bits that are not 0"),
        (WeightSpec(3, 8), "weight", torch.nan, "holds NaN or inf"),
        (PERMUTED, "weight_permutation", -1, "is not a permutation of 0 to 39"),
        (PERMUTED, "weight_permutation", 40, "is not a permutation of 0 to 39"),
        (PERMUTED, "weight_permutation", 32767, "is not a permutation of 0 to 39"),
    ],
)
def test_one_wrong_value_is_refused(spec: WeightSpec, part: str, value: float, complaint: str) -> None:
    tensors = stored(spec) | {"bias": torch.zeros(spec.d_out)}
    tensors[part].view(-1)[-1] = value
    with pytest.raises(HalfplateError, match=rf"^layer\.up\.{part} {complaint}") as raised:
        check_stored(spec, tensors, "layer.up")
    assert "\n" not in str(raised.value)


def test_an_input_that_is_named_twice_is_refused() -> None:
    tensors = stored(PERMUTED)
    tensors["weight_permutation"][3] = tensors["weight_permutation"][4]
    with pytest.raises(HalfplateError, match=r"^up\.weight_permutation is not a permutation"):
        check_stored(PERMUTED, tensors, "up")


def test_a_code_of_0_is_one_of_int4() -> None:
    tensors = stored(INT4)
    tensors["weight"].fill_(0)
    check_stored(INT4, tensors, "up")


@given(st.sampled_from([ODD, DENSE4, INT4, INT8, PERMUTED]), st.data())
@settings(max_examples=60, deadline=None)
def test_any_bytes_pass_or_are_refused_and_what_passes_is_finite(spec: WeightSpec, data: st.DataObject) -> None:
    tensors = stored(spec)
    part = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[part].view(-1).view(torch.uint8)
    for _ in range(3):
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_stored(spec, tensors, "up")
    except HalfplateError:
        return
    chain = Chain.from_tensors(spec, tensors)
    assert bool(chain.core.dense(torch.float64).isfinite().all())
    assert bool(chain.dense(torch.float64).isfinite().all())
