"""Kernels and verbs in a process whose defaults of torch are not ours, and native calls with buffers of the wrong size."""

import ctypes
import random

import pytest
import torch
from fuzz_operators import OPERATORS, case, fuzz
from safetensors.torch import load_file
from stored_linears import random_linear

import halfplate
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.kernels import linear, native
from halfplate.pattern import Pattern
from halfplate.runtime import greedy
from halfplate.solvers.armor.problem import Problem
from halfplate.solvers.armor.stages import _native_problem

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
QUICK = {"samples": 4, "seq_len": 32, "core_dtype": "int8", "block_size": 8, "method_options": {"iterations": 2}}
IDS = torch.tensor([[1, 17, 40, 3, 99, 5, 23]])


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_under_foreign_defaults(name):
    case(random.Random(0), name)


@pytest.mark.slow
def test_operators_under_random_defaults():
    fuzz(80, seed=1)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def compressed(tiny_folder_once, tmp_path_factory):
    out = tmp_path_factory.mktemp("defaults") / "out"
    halfplate.compress(str(tiny_folder_once), out, **QUICK)
    return out


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16, "meta", "inference", "autocast"], ids=str)
def foreign(request):
    """torch with other defaults, for the time of a test."""
    if isinstance(request.param, torch.dtype):
        torch.set_default_dtype(request.param)
        yield
        torch.set_default_dtype(torch.float32)
        return
    contexts = {"meta": lambda: torch.device("meta"), "inference": torch.inference_mode}
    contexts["autocast"] = lambda: torch.autocast("cpu", torch.bfloat16)
    with contexts[request.param]():
        yield


@pytest.mark.slow
def test_compress_writes_the_same_bytes(foreign, compressed, tiny_folder_once, tmp_path):
    halfplate.compress(str(tiny_folder_once), tmp_path / "out", **QUICK)
    assert files(tmp_path / "out") == files(compressed)


def test_load_and_generate_are_right(foreign, compressed):
    found = greedy(halfplate.load(compressed), IDS, 12)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            expected = greedy(halfplate.load(compressed, kernels=False), IDS, 12)
        finally:
            torch.set_default_dtype(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loaded_model_generates_the_same_under_another_default_type(compressed, dtype):
    model = halfplate.load(compressed)
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.set_default_dtype(dtype)
    try:
        found = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_model_loaded_in_inference_mode_can_be_restored_and_saved(compressed, tmp_path):
    with torch.inference_mode():
        model = halfplate.load(compressed)
    halfplate.runtime.restore(model)
    model.save_pretrained(tmp_path / "again")
    expected = load_file(compressed / "model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_inputs_that_are_not_on_the_processor_are_refused():
    spec = WeightSpec(8, 16)
    packed = linear.pack(spec, random_linear(spec))
    for x in (torch.ones(1, 16, device="meta"), torch.ones(1, 16, dtype=torch.int64)):
        with pytest.raises(HalfplateError, match="expected floating point on cpu"):
            linear.multiply(x, packed, 8)
    for wrong in (packed.to("meta"), packed[:10], packed.view(torch.int8)):
        with pytest.raises(HalfplateError, match="expected a packed matrix"):
            linear.multiply(torch.ones(1, 16), wrong, 8)


def test_a_damaged_header_is_refused_or_stays_in_bounds():
    spec = WeightSpec(8, 16, core_dtype="int8", out_block=4, wrapper_dtype="int8")
    taken = 0
    for byte in range(ctypes.sizeof(linear.Header)):
        packed = linear.pack(spec, random_linear(spec))
        packed[byte] ^= 0x41
        try:
            assert linear.multiply(torch.ones(1, 16), packed, 8).shape == (1, 8)
            taken += 1  # another size of blocks that takes as many bytes
        except HalfplateError:
            pass
    assert taken <= 4


def test_native_calls_refuse_buffers_of_the_wrong_size():
    spec = WeightSpec(8, 16)
    packed = linear.pack(spec, random_linear(spec))
    x, y, size = torch.ones(3, 16), torch.full((3, 8), 7.0), packed.numel()

    def call(x_bytes=4 * 48, apart=16, y_bytes=4 * 24, tokens=3, threads=1, nbytes=size):
        return native.library().halfplate_linear(
            packed.data_ptr(), nbytes, x.data_ptr(), x_bytes, apart, y.data_ptr(), y_bytes, tokens, threads
        )

    wrong = [
        {"x_bytes": 4 * 47},
        {"y_bytes": 2 * 24},
        {"y_bytes": 8 * 24},
        {"tokens": 4},
        {"tokens": 0},
        {"tokens": -1},
    ]
    wrong += [{"apart": 15}, {"apart": -1}, {"apart": 2**62}, {"tokens": 2**62}, {"threads": 0}, {"nbytes": 64}]
    for arguments in wrong:
        assert call(**arguments) < 0, arguments
        with pytest.raises(HalfplateError, match="refused its arguments"):
            native.check(call(**arguments), "linear")
    assert bool((y == 7).all())
    assert call() == 0
    assert call(threads=100_000) == 0  # a team as large as the machine has room for


def test_the_solver_refuses_buffers_of_the_wrong_size():
    spec = WeightSpec(8, 16, Pattern(2, 4), "fp32", 4, 4, "fp32")
    problem = Problem.from_weight(torch.randn(8, 16), torch.ones(16), spec)
    factors = problem.start()
    losses = torch.empty(problem.row_tiles, problem.col_tiles, dtype=torch.float64)

    def call(loss_bytes=losses.nbytes, **changes):
        arguments = _native_problem(problem, factors)
        for name, value in changes.items():
            if name == "bytes":
                arguments.bytes[value] -= 4
            else:
                setattr(arguments, name, value)
        return native.library().halfplate_sweep(ctypes.byref(arguments), losses.data_ptr(), loss_bytes)

    assert call() == 0
    assert call(loss_bytes=losses.nbytes // 2) < 0
    wrong = [{"bytes": place} for place in range(5)] + [{"kept": 17, "group": 32}, {"group": 3}, {"row_tiles": 10**9}]
    for arguments in [*wrong, {"col_tile": -4}, {"threads": 0}, {"weight": 0}, {"core": None}]:
        assert call(**arguments) < 0, arguments
