"""Packed linears against fp64 products of the unpacked weights, on every instruction set of this machine."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_linears import factors, random_linear

from halfplate.errors import HalfplateError
from halfplate.formats import NMSparse, WeightSpec
from halfplate.kernels import linear, native
from halfplate.kernels.kinds import FIVE_ON
from halfplate.pattern import DENSE, Pattern

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

SPARSE = Pattern(2, 4)
TOKENS = st.sampled_from([*range(1, 10), 16, 17, 31, 37])  # from 16 on, rows are multiplied in panels


@st.composite
def specs(
    draw, core_dtypes=("fp32", "bf16", "fp16", "int8", "int6", "int5", "nl5", "int4", "nl4", "int3", "nl3", "int2")
):
    pattern = draw(st.sampled_from([SPARSE, DENSE]))
    block = st.sampled_from([0, 0, 1, 4, 8, 12, 16, 32, 128, 200])
    return WeightSpec(
        d_out=draw(st.integers(1, 40)),
        d_in=4 * draw(st.integers(1, 70)) if pattern is SPARSE else draw(st.integers(1, 280)),
        pattern=pattern,
        core_dtype=draw(st.sampled_from(core_dtypes)),
        out_block=draw(block),
        in_block=draw(block),
        wrapper_dtype=draw(st.sampled_from(["fp32", "bf16", "fp16", "int8"])),
        group=draw(st.sampled_from([32, 64, 128])),
    )


def products(spec, tensors, x, bias=None):
    """x (A S B)ᵀ + bias in fp64, and the same sum of magnitudes, to which rounding is relative."""
    f = factors(spec, tensors)
    exact = x.double() @ (f.out @ f.core @ f.into).T
    bound = x.double().abs() @ (f.out.abs() @ f.core.abs() @ f.into.abs()).T
    return (exact, bound) if bias is None else (exact + bias, bound + bias.abs())


@given(specs(), TOKENS, st.booleans(), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_products_of_all_types_and_shapes(spec, tokens, biased, seed):
    tensors = random_linear(spec, seed)
    x = torch.randn(tokens, spec.d_in, generator=torch.Generator().manual_seed(seed))
    bias = torch.randn(spec.d_out) if biased else None
    exact, bound = products(spec, tensors, x, bias)
    y = linear.multiply(x, linear.pack(spec, tensors, bias=bias), spec.d_out)
    assert y.shape == (tokens, spec.d_out)
    assert ((y - exact).abs() <= 1e-6 * bound).all()


@given(specs(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_many_tokens_take_the_expanded_core(spec, biased, seed):
    tensors, bias = random_linear(spec, seed), torch.randn(spec.d_out) if biased else None
    x = torch.randn(5, spec.d_in, generator=torch.Generator().manual_seed(seed))
    exact, bound = products(spec, tensors, x, bias)
    packed = linear.pack(spec, tensors, bias=bias)
    y = linear._multiply_expanded(x, packed, linear.read_header(packed))
    assert ((y - exact).abs() <= 1e-6 * bound).all()


@given(
    specs(core_dtypes=("int8", "int6", "int5", "nl5", "int4", "nl4", "int3", "nl3", "int2")),
    TOKENS,
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_int8_activations_are_rounded_by_token_and_128_inputs(spec, tokens, seed):
    check_rounded(spec, tokens, seed, "int8", 128)


@pytest.mark.skipif(not linear.multiplies_bytes(), reason="int8 is not the fastest type of this processor")
@given(
    specs(core_dtypes=("int8", "int6", "int5", "nl5", "int4", "nl4", "int3", "nl3", "int2")),
    st.integers(2, 50),
    st.sampled_from(linear.GROUPS),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_many_tokens_are_rounded_by_the_groups_of_the_weights(spec, tokens, group, seed):
    check_rounded(replace(spec, group=group), tokens, seed, "auto", group)


def check_rounded(spec, tokens, seed, activations, span):
    """Check that inputs are at most half a step of the scale of their `span` columns off."""
    tensors = random_linear(spec, seed)
    x = torch.randn(tokens, spec.d_in, generator=torch.Generator().manual_seed(seed))
    f = factors(spec, tensors)
    z = x.double() @ f.into.T
    tiles = torch.nn.functional.pad(z, (0, -spec.d_in % span)).unflatten(1, (-1, span))
    half_a_step = tiles.abs().amax(-1, keepdim=True).expand_as(tiles).flatten(1)[:, : spec.d_in] / 127 * 0.501
    exact, bound = products(spec, tensors, x)
    rounding = half_a_step @ f.core.abs().T @ f.out.abs().T
    packed = linear.pack(spec, tensors, activations)
    y = linear.multiply(x, packed, spec.d_out)
    assert ((y - exact).abs() <= rounding + 1e-6 * bound).all()
    rounds = linear.takes_bytes(linear.read_header(packed), tokens)
    assert rounds or ((y - exact).abs() <= 1e-6 * bound).all()


def test_int8_activations_equal_the_rounded_product():
    spec = WeightSpec(24, 256, SPARSE, "int8")
    tensors = random_linear(spec)
    x = torch.randn(3, 256)
    tiles = x.unflatten(1, (2, 128))
    scale = tiles.abs().amax(-1, keepdim=True) / 127
    rounded = ((tiles / scale).round() * scale).flatten(1)
    exact, bound = products(spec, tensors, rounded)
    y = linear.multiply(x, linear.pack(spec, tensors, "int8"), 24)
    assert ((y - exact).abs() <= 1e-5 * bound).all()


@pytest.mark.skipif(not linear.multiplies_bytes(), reason="int8 is not the fastest type of this processor")
@given(
    st.sampled_from(("int8", "int6", "int5", "nl5", "int4", "nl4", "int3", "nl3", "int2")),
    st.sampled_from((DENSE, SPARSE)),
    st.integers(1, 75),
    st.integers(1, 90).map(lambda quarters: 4 * quarters),
    st.sampled_from(linear.GROUPS),
    st.integers(2, 40),
    st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_batches_equal_the_product_of_rounded_groups(core, pattern, d_out, d_in, group, tokens, seed):
    """The naive reference of panels of bytes: each group of inputs rounded by its largest, times the core in floats."""
    spec = WeightSpec(d_out, d_in, pattern, core, group=group)
    tensors = random_linear(spec, seed)
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(seed))
    rounded = x
    if tokens >= linear.bytes_from(pattern is SPARSE):
        groups = torch.nn.functional.pad(x, (0, -d_in % group)).unflatten(1, (-1, group))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        rounded = ((groups / scale.clamp_min(1e-30)).round() * scale).flatten(1)[:, :d_in]
    exact, bound = products(spec, tensors, rounded)
    y = linear.multiply(x, linear.pack(spec, tensors, "auto"), d_out)
    assert ((y - exact).abs() <= 1e-5 * bound).all()


@pytest.mark.skipif(not linear.multiplies_bytes(), reason="int8 is not the fastest type of this processor")
@pytest.mark.parametrize("core", ["nl4", "nl5", "int8"])
def test_a_rounded_token_does_not_depend_on_those_beside_it(core):
    spec = WeightSpec(44, 320, DENSE, core, group=32)
    packed = linear.pack(spec, random_linear(spec), "auto")
    x = torch.randn(31, 320)
    whole = linear.multiply(x, packed, 44)
    for tokens in range(linear.bytes_from(False), 31):
        assert torch.equal(linear.multiply(x[:tokens], packed, 44), whole[:tokens])


@given(specs(), st.booleans(), st.sampled_from(linear.ACTIVATIONS), st.integers(0, 1000))
@settings(max_examples=120, deadline=None)
def test_unpacking_returns_every_bit(spec, biased, activations, seed):
    tensors = random_linear(spec, seed)
    bias = torch.randn(spec.d_out) if biased else None
    back = linear.unpack(spec, linear.pack(spec, tensors, activations, bias))
    assert back.keys() == tensors.keys() | ({"bias"} if biased else set())
    for name, tensor in tensors.items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    if biased:
        assert torch.equal(back["bias"], bias)


@pytest.mark.parametrize("tokens", [7, 21, 40])
@pytest.mark.parametrize("pattern", [SPARSE, DENSE], ids=str)
@pytest.mark.parametrize("activations", linear.ACTIVATIONS)
def test_any_number_of_threads_gives_the_same_bits(activations, pattern, tokens):
    spec = WeightSpec(200, 264, pattern, "int8", 24, 12, "int8")
    packed, x = linear.pack(spec, random_linear(spec), activations), torch.randn(tokens, 264)
    results = []
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        results.append(linear.multiply(x, packed, 200))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_of_any_type_shape_and_stride(dtype):
    spec = WeightSpec(12, 36, SPARSE, "bf16", 4, 12)
    tensors = random_linear(spec)
    packed = linear.pack(spec, tensors)
    x = torch.randn(2, 3, 36).to(dtype)
    exact, bound = products(spec, tensors, x.float().flatten(0, 1))
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    room = torch.randn(2, 3, 73).to(dtype)
    room[:, :, 1::2] = x  # every other column, and not at the start of a line
    for given_x in (
        x,
        room[:, :, 1::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], 2)[:, :, :36],
    ):
        y = linear.multiply(given_x, packed, 12)
        assert y.dtype == dtype
        assert y.shape == (2, 3, 12)
        assert ((y.flatten(0, 1).double() - exact).abs() <= 2 * step * bound).all()


@pytest.mark.parametrize("shape", [(0, 36), (2, 0, 36)])
def test_an_empty_batch_gives_an_empty_result(shape):
    spec = WeightSpec(12, 36)
    assert linear.multiply(torch.empty(shape), linear.pack(spec, random_linear(spec)), 12).shape == (*shape[:-1], 12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("core_dtype", "activations"),
    [("fp32", "float"), ("bf16", "float"), ("int4", "float"), ("int8", "int8"), ("int4", "int8")],
)
def test_nan_and_inf_reach_every_output_whose_kept_weights_touch_them(bad, core_dtype, activations):
    spec = WeightSpec(40, 300, SPARSE, core_dtype)
    tensors = random_linear(spec)
    packed = linear.pack(spec, tensors, activations)
    x = torch.randn(3, 300)
    x[1, 7] = bad
    y = linear.multiply(x, packed, 40)
    touched = (
        torch.zeros(40, 300).scatter(1, torch.arange(150).expand(40, -1) // 2 * 4 + positions_of(tensors), 1.0)[:, 7]
        > 0
    )
    assert touched.any()
    assert not y[1][touched].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    expanded = linear._multiply_expanded(x, packed, linear.read_header(packed)) if activations == "float" else y
    assert not expanded[1][touched].isfinite().any()
    assert expanded[[0, 2]].isfinite().all()


@pytest.mark.parametrize("core_dtype", ["nl4", "int5", "nl5"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_every_output_of_an_unpruned_core(bad, core_dtype):
    spec = WeightSpec(9, 300, DENSE, core_dtype, group=32)
    packed, x = linear.pack(spec, random_linear(spec)), torch.randn(3, 300)
    x[1, 299] = bad
    # A weight of 0 makes inf a NaN.
    assert not linear.multiply(x, packed, 9)[1].isfinite().any()
    assert linear.multiply(x, packed, 9)[[0, 2]].isfinite().all()


def positions_of(tensors):
    index = tensors["weight_index"]
    return torch.stack([index >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)[:, :150].long()


@given(specs(), st.sampled_from(linear.ACTIVATIONS), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_packed_in_bounds_or_refused(spec, activations, random):
    tensors = random_linear(spec)
    for tensor in tensors.values():
        raw = tensor.view(torch.uint8).flatten()
        for _ in range(random.randrange(4)):
            raw[random.randrange(raw.numel())] = random.randrange(256)
    try:
        packed = linear.pack(spec, tensors, activations)
    except HalfplateError:
        return
    linear.multiply(torch.ones(2, spec.d_in), packed, spec.d_out)
    back = linear.unpack(spec, packed)
    assert all(torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("part", "byte", "words"),
    [
        ("weight_index", 0b0001, "positions that do not increase"),
        ("weight_scales", 0xFF, "NaN or inf"),
        ("weight_in_blocks", 0x80, "codes outside"),
    ],
)
def test_what_no_writer_leaves_is_refused(part, byte, words):
    spec = WeightSpec(8, 16, SPARSE, "int8", 4, 4, "int8")
    tensors = random_linear(spec)
    tensors[part].view(torch.uint8).flatten()[:2] = byte
    with pytest.raises(HalfplateError, match=words):
        linear.pack(spec, tensors)


@pytest.mark.parametrize("core_dtype", ["int5", "nl5", "int4", "nl4"])
def test_bits_after_the_last_code_of_a_row_are_refused(core_dtype):
    spec = WeightSpec(3, 13, DENSE, core_dtype, group=32)
    tensors = random_linear(spec)
    tensors["weight"][..., 2, -1] |= 0x80
    with pytest.raises(HalfplateError, match=r"codes outside|padding bits"):
        linear.pack(spec, tensors)


@pytest.mark.parametrize(
    ("core_dtype", "pattern", "activations", "bits"),
    [
        ("nl5", DENSE, "float", 5.5),
        ("nl5k", DENSE, "float", 5.5),
        ("int5", DENSE, "float", 5.5),
        ("nl5", DENSE, "int8", 8.5),
        ("nl5", SPARSE, "float", 5.5),
        ("nl4", DENSE, "float", 4.5),
        ("int6", DENSE, "float", 8.5),
    ],
)
def test_bits_of_a_weight_in_memory(core_dtype, pattern, activations, bits):
    """Codes of five bits stay so in unpruned cores, if vectors are long enough; in others they take eight."""
    if bits == 5.5 and pattern is DENSE and native.isa() not in FIVE_ON:
        bits = 8.5
    spec = WeightSpec(512, 1024, pattern, core_dtype, group=32)
    header = linear.header_of(spec, activations, False)
    assert (8 * header.nbytes / (512 * 1024)) == pytest.approx(bits, rel=0.01)


def test_scales_under_super_scales_come_back():
    weight = torch.randn(5, 300)
    tensors = NMSparse.from_dense(weight, None, DENSE, "nl5k", group=32).tensors()
    spec = WeightSpec(5, 300, DENSE, "nl5k", group=32)
    packed = linear.pack(spec, tensors)
    back = linear.unpack(spec, packed)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    y = linear.multiply(torch.eye(300), packed, 5).T
    assert (y - weight).norm() < 0.05 * weight.norm()


def test_a_wrong_shape_is_refused():
    spec = WeightSpec(8, 16)
    tensors = random_linear(spec)
    with pytest.raises(HalfplateError, match=r"weight_index is torch.uint8 \(8, 1\).*expected torch.uint8 \(8, 2\)"):
        linear.pack(spec, tensors | {"weight_index": tensors["weight_index"][:, :1]})
    with pytest.raises(HalfplateError, match="x has 12 columns"):
        linear.multiply(torch.ones(1, 12), linear.pack(spec, tensors), 8)


def unsupported(spec):
    """Why no kernel runs `spec` on any machine."""
    refusal = linear.NATIVE.refusal(spec)
    return refusal and refusal.reason


def test_patterns_without_kernels_say_so():
    assert "pattern 4:8" in unsupported(WeightSpec(8, 16, Pattern(4, 8)))
    assert unsupported(WeightSpec(8, 16)) is None
    assert "permuted inputs" in unsupported(WeightSpec(8, 16, permuted=True))
    assert "groups of 16 columns" in unsupported(WeightSpec(8, 256, DENSE, "int6k", group=16))
    assert unsupported(WeightSpec(8, 256, DENSE, "int6k", group=32)) is None


ISAS = ("baseline", "avx2", "avx512")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_passes(isa):
    """This file again, in a process that is told to use an older instruction set."""
    if os.environ.get("HALFPLATE_ISA"):
        pytest.skip("already in such a process")
    if native.isa() in ISAS[: ISAS.index(isa) + 1]:
        return  # it is the one of this process, or this processor lacks it
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            __file__,
            "-k",
            "not every_instruction_set",
        ],
        env=os.environ | {"HALFPLATE_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
