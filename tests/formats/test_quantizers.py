"""Quantizers: the uniform ones by their definition, and two that nothing but their own file and a line of the registry knows."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, NMSparse, WeightSpec, check_stored
from halfplate.formats.encoding.packing import pack
from halfplate.formats.quantizers import QUANTIZERS, quantizer_of
from halfplate.formats.quantizers.base import half_above, shares_down_to
from halfplate.formats.quantizers.rounding import round_groups
from halfplate.kernels.linear import NATIVE
from halfplate.methods import create
from halfplate.pattern import Pattern
from halfplate.recovery.trainable import TrainableLinear
from halfplate.statistics import InputStatistics

sys.path.append(str(Path(__file__).parents[2] / "examples" / "extensions"))

from halfplate_extensions.quantizer import TABLE as VALUES
from halfplate_extensions.quantizer import NormalFloat

TABLE = VALUES.tolist()


@dataclass(frozen=True)
class Affine:
    """(q + 4) · scale + minimum of three bits."""

    name: str = "affine3"
    bits: int = 3
    range: tuple[int, int] = (-4, 3)
    stored: ClassVar[tuple[str, ...]] = ("scales", "minima")

    def nearest(self, values: Tensor, *parameters: Tensor) -> Tensor:
        scales, minima = parameters
        return torch.where(scales > 0, (values - minima) / scales - 4, -4).round().clamp(-4, 3)

    def decode(self, numbers: Tensor, *parameters: Tensor) -> Tensor:
        scales, minima = parameters
        return (numbers + 4) * scales + minima

    def refit(
        self, values: Tensor, shares: Sequence[float] | None = None, energy: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        minima = values.amin(-1).half()
        scales = half_above((values.amax(-1) - minima.float()).clamp_min(0) / 7)
        return self.nearest(values, scales.float()[..., None], minima.float()[..., None]), (scales, minima)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as if each were a file of halfplate.formats.quantizers with its line in the registry."""
    file = ModuleType("a_file_of_quantizers")
    file.CODEBOOK, file.AFFINE = NormalFloat("codebook4"), Affine()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(QUANTIZERS.own, "codebook4", f"{file.__name__}:CODEBOOK")
    monkeypatch.setitem(QUANTIZERS.own, "affine3", f"{file.__name__}:AFFINE")


def random_values(rows: int, count: int, seed: int) -> Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))


def statistics_of(d_in: int) -> InputStatistics:
    inputs = (random_values(300, d_in, 8) + random_values(300, 1, 9)).double()
    gram = inputs.T @ inputs / 300
    return InputStatistics(300, gram.diagonal().float(), gram)


def output_error(weight: Tensor, found: Tensor, statistics: InputStatistics) -> float:
    error = (weight - found).double()
    return float(((error @ statistics.require_gram()) * error).sum())


def nearest_of_table(value: float, scale: float) -> int:
    """The place of the nearest value, by looking at all of them."""
    return min(range(16), key=lambda place: abs(TABLE[place] * scale - value)) if scale else 7


NL5 = [-127, -108, -94, -84, -75, -67, -60, -54, -48, -41, -35, -29, -24, -18, -12, -6]
NL5 += [0, 6, 12, 18, 24, 30, 36, 42, 48, 55, 61, 69, 78, 89, 102, 122]
NL4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


@pytest.mark.parametrize(
    ("name", "numbers"), [("nl5", NL5), ("nl4", NL4), ("nl3", [-127, -78, -45, -18, 8, 36, 70, 119])]
)
def test_values_of_a_table_are_the_nearest_of_all(name: str, numbers: list[int]) -> None:
    quantizer, half = QUANTIZERS.get(name), len(numbers) // 2
    assert (quantizer.bits, quantizer.range, quantizer.stored) == (int(name[-1]), (-half, half - 1), ("scales",))
    scales = torch.tensor([[0.5], [0.0], [3.0]], dtype=torch.float64)
    values = random_values(3, 400, 1).double()
    found = quantizer.nearest(values, scales)
    for row, scale in enumerate(scales[:, 0].tolist()):
        for value, code in zip(values[row].tolist(), found[row].tolist(), strict=True):
            best = min(range(2 * half), key=lambda k: abs(numbers[k] * scale - value)) - half if scale else 0
            assert code == best
    decoded = quantizer.decode(torch.arange(-half, half), torch.tensor(1.0))
    assert decoded.tolist() == numbers


@pytest.mark.parametrize("name", ["nl5", "nl4", "nl3"])
def test_fitted_scales_of_a_table_are_better_than_one_share_for_all(name: str) -> None:
    quantizer = QUANTIZERS.get(name)
    values = random_values(20, 32, 2)
    values[3], values[4] = values[3].abs(), -values[4].abs()
    codes, (scales,) = quantizer.refit(values)
    errors = (quantizer.decode(codes, scales.float()[:, None]) - values).square().sum(1)
    for share in torch.linspace(0.6, 1.3, 30):
        each = (values.abs().amax(1) / 127 * share)[:, None]
        other = (quantizer.decode(quantizer.nearest(values, each), each) - values).square().sum(1)
        assert errors.sum() <= other.sum()
    assert bool((quantizer.refit(torch.zeros(2, 8))[1][0] == 0).all())


@pytest.mark.parametrize("name", ["int8", "int6", "int5", "int4", "int3", "int2"])
def test_uniform_values_are_multiples_of_the_scale(name: str) -> None:
    quantizer = QUANTIZERS.get(name)
    least, greatest = quantizer.range
    assert (quantizer.name, quantizer.bits, quantizer.stored) == (name, int(name[-1]), ("scales",))
    ends = {
        "int8": (-127, 127),
        "int6": (-32, 31),
        "int5": (-16, 15),
        "int4": (-8, 7),
        "int3": (-4, 3),
        "int2": (-2, 1),
    }
    assert (least, greatest) == ends[name]
    scales = torch.tensor([[0.5], [0.0], [3.0]], dtype=torch.float64)
    values = random_values(3, 400, 1).double() * greatest
    numbers = quantizer.nearest(values, scales)
    for row, scale in enumerate(scales[:, 0].tolist()):
        for value, number in zip(values[row].tolist(), numbers[row].tolist(), strict=True):
            assert number == (min(max(round(value / scale), least), greatest) if scale else 0)
    assert torch.equal(quantizer.decode(numbers, scales), numbers * scales)


def test_of_two_values_as_near_the_even_one_is_taken_after_a_true_division() -> None:
    # Times the reciprocal, which is rounded, 0.1 · 4.5 would be on the other side of the middle.
    quantizer, scale = QUANTIZERS.get("int8"), torch.tensor(49.0)
    values = torch.tensor([0.5, 1.5, 2.5, 3.5, 24.5]) * scale
    assert quantizer.nearest(values, scale).tolist() == [0, 2, 2, 4, 24]


def test_codebook_rounds_as_looking_at_all_values_does(registered: None) -> None:
    values = random_values(4, 150, 3)
    values[1, :64] = 0
    quantizer = QUANTIZERS.get("codebook4")
    numbers, (scales,) = round_groups(values, quantizer, 64)
    assert (scales.shape, scales.dtype, numbers.dtype) == ((4, 3), torch.float16, torch.int8)
    for row in range(4):
        for group in range(3):
            part = values[row, 64 * group : 64 * (group + 1)].tolist()
            errors, tried = [], shares_down_to(0.6)
            for share in tried:
                scale = float(half_above(torch.tensor(max(map(abs, part)) * share)))
                errors.append(sum((TABLE[nearest_of_table(value, scale)] * scale - value) ** 2 for value in part))
            scale = float(scales[row, group])
            places = [nearest_of_table(value, scale) for value in part]
            assert [number + 8 for number in numbers[row, 64 * group : 64 * (group + 1)].tolist()] == places
            found = sum((TABLE[place] * scale - value) ** 2 for place, value in zip(places, part, strict=True))
            assert found == pytest.approx(min(errors), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("pattern", ["dense", "2:4", "3:6"])
@pytest.mark.parametrize("name", ["codebook4", "affine3"])
def test_cores_hold_them_and_come_back(registered: None, name: str, pattern: str) -> None:
    spec = WeightSpec(6, 150 if pattern != "2:4" else 152, Pattern.parse(pattern), name, group=64)
    weight = random_values(6, spec.d_in, 4) + 0.5
    mask = None
    if not spec.pattern.is_dense:
        mask = torch.zeros(6, spec.d_in, dtype=torch.bool)
        mask[:, torch.arange(spec.d_in) % spec.pattern.m < spec.pattern.n] = True
    core = NMSparse.from_dense(weight, mask, spec.pattern, name, 64)
    tensors, quantizer = core.tensors(), QUANTIZERS.get(name)
    assert {key: (tuple(part.shape), part.dtype) for key, part in tensors.items()} == spec.layout()
    check_stored(spec, tensors, "core")
    again = NMSparse.from_tensors(spec, tensors)
    assert torch.equal(again.dense(), core.dense())
    each = [tensors[f"weight_{part}"].float().repeat_interleave(64, 1)[:, : spec.d_in] for part in quantizer.stored]
    expected = quantizer.decode(quantizer.nearest(weight, *each), *each)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(core.dense(), expected.masked_fill(~kept, 0))
    assert spec.nbytes == core.nbytes


@pytest.mark.parametrize(
    ("method", "pattern", "name"),
    [
        ("rtn", "dense", "codebook4"),
        ("rtn", "dense", "affine3"),
        ("gptq", "dense", "codebook4"),
        ("gptq", "dense", "affine3"),
        ("sparsegpt", "2:4", "codebook4"),
        ("sparsegpt", "2:4", "affine3"),
        ("armor", "dense", "codebook4"),
        ("armor", "2:4", "codebook4"),
        ("armor", "2:4", "affine3"),
    ],
)
def test_methods_use_them(registered: None, method: str, pattern: str, name: str) -> None:
    # Small for armor: its native sweep does not know them, and that in torch takes a group at a time.
    d_out, d_in, blocks = (8, 40, (4, 4)) if method == "armor" else (16, 64, ())
    spec = WeightSpec(d_out, d_in, Pattern.parse(pattern), name, *blocks, group=32)
    weight, statistics = random_values(d_out, d_in, 5), statistics_of(d_in)
    options = {"iterations": 2, "grid_iterations": 1} if method == "armor" else {}
    chain = create(method, **options).compress(weight, statistics, spec).weight
    assert {key: (tuple(part.shape), part.dtype) for key, part in chain.tensors().items()} == spec.layout()
    if pattern == "dense" and method != "rtn":
        plain = WeightSpec(d_out, d_in, spec.pattern, name, group=32)
        blunt = create("rtn").compress(weight, statistics, plain).weight
        limit = 0.9 * output_error(weight, blunt.dense(), statistics)
    else:
        limit = output_error(weight, torch.zeros_like(weight), statistics) * 0.3
    assert output_error(weight, chain.dense(), statistics) < limit


def test_scales_of_a_codebook_can_be_trained_and_those_with_minima_are_refused(registered: None) -> None:
    linears = []
    for name in ("codebook4", "affine3"):
        spec = WeightSpec(8, 64, Pattern(1, 1), name, group=32)
        chain = create("rtn").compress(random_values(8, 64, 6), InputStatistics(), spec).weight
        linears.append(CompressedLinear.from_weight(chain, spec, None))
    trained, x = TrainableLinear(linears[0], values_too=True), random_values(3, 64, 7)
    torch.testing.assert_close(trained(x), linears[0](x), rtol=1e-4, atol=1e-4)
    trained(x).square().sum().backward()
    assert isinstance(trained.core.values, nn.Parameter)
    assert bool((trained.core.values.grad != 0).all())
    assert torch.equal(trained.compressed().stored()["weight_scales"], linears[0].stored()["weight_scales"])
    with pytest.raises(HalfplateError, match="core_dtype='affine3' stores scales and minima, expected scales alone"):
        TrainableLinear(linears[1], values_too=True)


@pytest.mark.parametrize("name", ["codebook4", "affine3"])
def test_kernels_that_do_not_know_them_refuse_them(registered: None, name: str) -> None:
    refusal = NATIVE.refusal(WeightSpec(8, 128, Pattern(1, 1), name))
    assert refusal is not None
    assert refusal.reason == f"no kernel for core_dtype='{name}'"


@pytest.mark.parametrize("core_dtype", ["int8", "codebook4"])
def test_codes_out_of_the_range_of_their_quantizer_are_damage(registered: None, core_dtype: str) -> None:
    spec = WeightSpec(2, 128, Pattern(1, 1), core_dtype)
    codes = torch.full((2, 128), 3)
    tensors = {"weight": pack(codes, QUANTIZERS.get(core_dtype).bits)[None]}
    tensors["weight_scales"] = torch.ones(2, 1, dtype=torch.float16)
    check_stored(spec, tensors, "q")
    codes[1, 5] = 0
    tensors["weight"] = pack(codes, QUANTIZERS.get(core_dtype).bits)[None]
    if core_dtype != "int8":  # all codes of four bits stand for a value
        return check_stored(spec, tensors, "q")
    with pytest.raises(HalfplateError, match=r"q\.weight holds the code 0, expected 1 to 255; the file is damaged"):
        check_stored(spec, tensors, "q")


def test_floats_have_no_quantizer_and_unknown_names_are_refused() -> None:
    assert [quantizer_of(name) for name in ("fp32", "bf16", "fp16")] == [None] * 3
    for find in (QUANTIZERS.get, quantizer_of):
        with pytest.raises(HalfplateError) as caught:
            find("int7")
        assert str(caught.value).startswith("core_dtype='int7' is unknown; ")
        assert str(caught.value).endswith(f"available: {', '.join(QUANTIZERS)}")
