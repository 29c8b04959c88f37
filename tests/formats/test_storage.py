"""Scales and minima under super-scales: exact in fp16, of the true size, and refused where they are damaged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import NMSparse, WeightSpec, check_stored
from halfplate.formats.encoding.packing import unpack
from halfplate.formats.quantizers import QUANTIZERS, storage_of
from halfplate.formats.quantizers.rounding import round_groups
from halfplate.formats.quantizers.storage import SuperScales
from halfplate.pattern import DENSE

WITH_SUPERS = [name for name in QUANTIZERS if storage_of(QUANTIZERS.get(name)).span > 1]
NAMES = ("scales", "minima")


def random_values(rows: int, count: int, seed: int) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.sampled_from([4, 5, 6]),
    st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_what_is_chosen_comes_back_bit_for_bit(rows: int, groups: int, bits: int, size: float, seed: int) -> None:
    storage, most = SuperScales(bits), 2**bits - 1
    sizes = [(random_values(rows, groups, seed + k).abs() * size).clamp_max(65504) for k in range(2)]
    wished = (sizes[0], -sizes[1])
    wished[0][0, 0], wished[1][-1, -1] = 0, 0
    units = storage.units(NAMES, wished)
    found = storage.nearest(NAMES, wished, units)
    stored = storage.stored(NAMES, found)
    layout = storage.layout(NAMES, groups)
    assert [(tuple(part.shape), part.dtype) for part in stored] == [((rows, n), kind) for n, kind in layout.values()]
    assert all(torch.equal(*pair) for pair in zip(storage.parameters(NAMES, stored, groups), found, strict=True))
    # By definition: the integer of a group times the number that eight groups share, in fp64.
    for place, sign in enumerate((1, -1)):
        codes, supers = unpack(stored[2 * place], groups, bits), stored[2 * place + 1]
        for row in range(rows):
            for group in range(groups):
                product = sign * int(codes[row, group]) * float(supers[row, group // 8])
                assert product == float(found[place][row, group])
                error, unit = abs(product - float(wished[place][row, group])), float(units[place][row, group])
                assert unit <= max(2.2 * float(wished[place][row].abs().max()) / most, 2.0**-19)
                assert error <= (0.5 if place or product > 1.5 * unit else 1) * unit * (1 + 1e-5)
    assert bool((found[0][wished[0] > 0] > 0).all())  # no group loses its values


def test_other_numbers_cannot_be_stored() -> None:
    scales = torch.tensor([[1.0, 1.001]]).half()
    with pytest.raises(HalfplateError, match="scales are not the products of a super-scale and integers of 6 bits"):
        SuperScales().stored(("scales",), (scales,))


@pytest.mark.parametrize("name", WITH_SUPERS)
@pytest.mark.parametrize(("d_in", "group"), [(576, 32), (40, 32), (256, 32), (576, 16)])
def test_cores_with_super_scales_have_the_values_of_the_definition(name: str, d_in: int, group: int) -> None:
    quantizer, spec = QUANTIZERS.get(name), WeightSpec(3, d_in, DENSE, name, group=group)
    weight, groups = random_values(3, d_in, 4) * 0.1, -(-d_in // group)
    core = NMSparse.from_dense(weight, None, DENSE, name, group)
    tensors, bits = core.tensors(), storage_of(quantizer).bits
    assert {key: (tuple(part.shape), part.dtype) for key, part in tensors.items()} == spec.layout()
    assert spec.nbytes == core.nbytes
    check_stored(spec, tensors, "core")
    each = [tensors["weight_super_scales"].double().repeat_interleave(256 // group, 1)[:, :groups]]
    each[0] *= unpack(tensors["weight_scale_codes"], groups, bits)
    if "weight_super_minima" in tensors:
        minima = tensors["weight_super_minima"].double().repeat_interleave(256 // group, 1)[:, :groups]
        each.append(-minima * unpack(tensors["weight_minimum_codes"], groups, bits))
    each = [part.repeat_interleave(group, 1)[:, :d_in] for part in each]
    exact = quantizer.decode(core.integers(), *each)
    assert torch.equal(core.dense(torch.float64), exact.float().double())
    assert torch.equal(NMSparse.from_tensors(spec, tensors).dense(), core.dense())
    again = NMSparse.joined([core.rows(WeightSpec(1, d_in, DENSE, name, group=group), row) for row in range(3)])
    assert all(torch.equal(again.tensors()[key], part) for key, part in tensors.items())
    # They cost hardly more error than fp16 scales.
    plain = round_groups(weight, QUANTIZERS.get(name.rstrip("ks")), group)
    free = QUANTIZERS.get(name.rstrip("ks"))
    values = free.decode(plain[0], *(part.float().repeat_interleave(group, 1)[:, :d_in] for part in plain[1]))
    assert (core.dense() - weight).square().sum() < 1.25 * (values - weight).square().sum()


def test_damaged_scales_are_refused() -> None:
    spec = WeightSpec(2, 96, DENSE, "affine4k", group=32)
    good = NMSparse.from_dense(random_values(2, 96, 1), None, DENSE, "affine4k", 32).tensors()
    for name, change, message in (
        ("weight_scale_codes", lambda part: part | 0x80, "weight_scale_codes has padding bits that are not 0"),
        ("weight_super_scales", lambda part: -part, "weight_super_scales holds -"),
        ("weight_super_minima", lambda part: -part, "weight_super_minima holds -"),
        ("weight_super_minima", lambda part: part * torch.inf, "weight_super_minima holds NaN or inf"),
    ):
        with pytest.raises(HalfplateError, match=message):
            check_stored(spec, good | {name: change(good[name])}, "q")


@pytest.mark.parametrize("name", ["affine5", "affine4", "affine3", "affine2"])
def test_fitted_minima_are_better_than_the_whole_range(name: str) -> None:
    quantizer = QUANTIZERS.get(name)
    values = random_values(40, 32, 2)
    values[3], values[4], values[5], values[6] = values[3].abs() + 1, -values[4].abs(), 0, 0.7
    values[7] = values[7] ** 3
    codes, parameters = quantizer.refit(values)
    scales, minima = (part.float()[:, None] for part in parameters)
    error = (quantizer.decode(codes, scales, minima) - values).square().sum(1)
    low, high = values.amin(1, keepdim=True).clamp_max(0), values.amax(1, keepdim=True).clamp_min(0)
    step = ((high - low) / (2**quantizer.bits - 1)).half().float()
    blunt = (
        ((values - low) / step).nan_to_num(0).round().clamp(0, 2**quantizer.bits - 1) * step + low - values
    ).square()
    assert bool((error <= blunt.sum(1) * 1.001 + 1e-5).all())
    assert error.sum() < 0.95 * blunt.sum()
    assert float(error[5]) == 0
    assert bool((minima <= 0).all())
    assert bool((scales >= 0).all())
