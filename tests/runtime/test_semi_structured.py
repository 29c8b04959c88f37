"""The CUDA path as far as a machine without a GPU can run it: packing, wrappers, refusals.

torch multiplies semi-structured tensors on CUDA alone, but its conversions for CUTLASS are plain torch.
"""

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.pattern import Pattern
from halfplate.runtime.backends import Options, cuda, pack
from halfplate.runtime.backends.cuda import SEMI_STRUCTURED_PRODUCTS, SemiStructuredLinear, SemiStructuredProducts

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def conversions():
    """torch's own packing, which is a private module and may go."""
    return pytest.importorskip("torch.sparse._semi_structured_conversions")


def random_linear(spec, bias=False, seed=0):
    """A compressed linear of random values, positions and blocks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in spec.layout().items():
        if name == "weight_index":
            # Two positions of two bits each to a nibble: six pairs rise.
            pairs = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8)
            low, high = (pairs[torch.randint(6, shape, generator=generator)] for _ in range(2))
            tensors[name] = low | high << 4
        elif dtype == torch.uint8:
            tensors[name] = torch.randint(1, 255, shape, generator=generator).to(dtype)
        elif dtype == torch.int8:
            tensors[name] = torch.randint(-127, 128, shape, generator=generator).to(dtype)
        elif name.endswith("_scales"):
            tensors[name] = (0.01 + 0.01 * torch.rand(shape, generator=generator)).to(dtype)
        else:
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    module = CompressedLinear(spec, bias, device="meta", bias_dtype=torch.float32 if bias else None)
    if bias:
        tensors["bias"] = torch.randn(spec.d_out, generator=generator)
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


@pytest.mark.parametrize("core_dtype", ["fp16", "bf16"])
def test_packing_for_cutlass_loses_nothing(core_dtype):
    conversion = conversions()
    core = random_linear(WeightSpec(64, 128, Pattern(2, 4), core_dtype)).matrix.core
    dense = core.dense(DTYPES[core_dtype])
    values, meta = conversion.sparse_semi_structured_from_dense_cutlass(dense)
    assert values.shape == (64, 64)
    assert torch.equal(conversion.sparse_semi_structured_to_dense_cutlass(values, meta), dense)
    # What CUTLASS keeps is what the checkpoint keeps: no value was drawn as zero.
    assert bool((dense != 0).sum() == core.values.numel())
    assert torch.equal(values, core.values)


def test_packing_of_int8_codes_loses_nothing():
    conversion = conversions()
    core = random_linear(WeightSpec(64, 128, Pattern(2, 4), "bf16")).matrix.core
    codes = torch.where(core.mask(), torch.randint(1, 128, core.shape), 0).to(torch.int8)
    values, meta = conversion.sparse_semi_structured_from_dense_cutlass(codes)
    assert torch.equal(conversion.sparse_semi_structured_to_dense_cutlass(values, meta), codes)


def test_packing_keeps_stored_zeros_out_of_the_way():
    conversion = conversions()
    core = random_linear(WeightSpec(32, 64, Pattern(2, 4), "bf16")).matrix.core
    core.stored[:, ::3] = 0
    dense = core.dense(torch.bfloat16)
    values, meta = conversion.sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(conversion.sparse_semi_structured_to_dense_cutlass(values, meta), dense)


@pytest.mark.parametrize(("out_block", "in_block"), [(0, 0), (16, 16), (24, 32), (0, 16), (1, 1), (128, 128)])
@pytest.mark.parametrize(
    ("bias", "core_dtype", "wrapper_dtype"),
    [(False, "bf16", "bf16"), (True, "fp16", "bf16"), (True, "int8", "bf16"), (False, "int4", "int8")],
)
def test_module_multiplies_as_the_format_does(out_block, in_block, bias, core_dtype, wrapper_dtype):
    module = random_linear(WeightSpec(64, 96, Pattern(2, 4), core_dtype, out_block, in_block, wrapper_dtype), bias)
    # Without a GPU the packed core is the dense matrix itself; wrappers, bias and casts are those of the GPU.
    prepared = SemiStructuredLinear(module, torch.bfloat16, pack=lambda dense: dense)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    expected = module.matrix.dense(torch.float64)
    expected = x.double() @ expected.T + (module.bias.double() if bias else 0)
    found = prepared(x)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.01  # three products in bf16
    assert prepared(x[:, :0]).shape == (3, 0, 64)
    assert prepared(x.half()).dtype == torch.float16


def test_module_packs_a_contiguous_2_4_matrix_of_its_type():
    seen = []
    module = random_linear(WeightSpec(32, 64, Pattern(2, 4), "fp16", 8, 8))
    SemiStructuredLinear(module, torch.float16, pack=lambda dense: seen.append(dense) or dense)
    (dense,) = seen
    assert dense.is_contiguous()
    assert dense.dtype == torch.float16
    assert int((dense.view(32, 16, 4) != 0).sum(-1).max()) <= 2


@pytest.mark.parametrize(("core_dtype", "wrapper_dtype"), [("bf16", "fp32"), ("int8", "bf16"), ("int2", "int8")])
def test_what_was_packed_comes_back_bit_for_bit(core_dtype, wrapper_dtype):
    module = random_linear(WeightSpec(32, 64, Pattern(2, 4), core_dtype, 8, 24, wrapper_dtype), bias=True)
    module.weight[:, ::3] = 1  # zero as a code, and no zero keeps its place in the products
    state = module.state_dict()
    packed = SemiStructuredLinear(module, torch.bfloat16, pack=lambda dense: dense).train(module.training)
    for found in (packed.state_dict(), packed.restored().state_dict()):
        assert found.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert packed.restored().spec == module.spec
    assert torch.equal(packed.dense()[0], module.dense()[0])
    assert torch.equal(packed.bias, module.bias)
    assert packed.path == "semi-structured products of torch"
    assert "out_features=32" in repr(packed)


def test_gradients_reach_inputs():
    module = random_linear(WeightSpec(32, 64, Pattern(2, 4), "bf16", 8, 8), bias=True)
    packed = SemiStructuredLinear(module, torch.bfloat16, pack=lambda dense: dense)
    grads = []
    for linear in (module, packed):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        linear(x).square().sum().backward()
        grads.append(x.grad)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.02  # products in bf16


def test_moving_and_loading_name_the_cure():
    packed = SemiStructuredLinear(random_linear(WeightSpec(32, 64)), torch.bfloat16, pack=lambda dense: dense)
    for act in (lambda: packed.to("meta"), lambda: packed.load_state_dict(packed.state_dict())):
        with pytest.raises(HalfplateError, match="restore"):
            act()
    assert packed.to(torch.float16).weight.dtype == torch.float16
    assert packed.core.dtype == torch.bfloat16


def unsupported(spec):
    """Why no product of torch runs `spec` on any GPU."""
    refusal = SEMI_STRUCTURED_PRODUCTS.capability.refusal(spec)
    return refusal and refusal.reason


def test_reasons_to_stay():
    with pytest.raises(HalfplateError, match="semi-structured products of torch are for cuda, not for cpu"):
        SEMI_STRUCTURED_PRODUCTS.pack(random_linear(WeightSpec(32, 64)))
    assert "pattern 2:4, not 4:8" in unsupported(WeightSpec(32, 64, Pattern(4, 8)))
    assert "fp32" in unsupported(WeightSpec(32, 64, core_dtype="fp32"))
    assert "permuted inputs" in unsupported(WeightSpec(32, 64, permuted=True))
    assert unsupported(WeightSpec(32, 64, core_dtype="fp16")) is None


class Pretended(SemiStructuredProducts):
    """The processor passes for a GPU, so that the choice of library can be followed."""

    devices = frozenset({"cpu"})

    def unavailable(self, device):
        return None


def packed_or_why(module):
    return pack(module, Options(), [Pretended()])


def test_libraries_are_tried_in_turn(monkeypatch):
    def refuse(dense):
        raise RuntimeError("no cuSPARSELt\nin this build")

    module = random_linear(WeightSpec(32, 64))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    monkeypatch.setattr(cuda, "_cutlass", lambda dense: dense)
    packed = packed_or_why(module)
    assert isinstance(packed, SemiStructuredLinear)
    assert packed.product_dtype == torch.bfloat16
    monkeypatch.setattr(cuda, "_cutlass", refuse)
    assert packed_or_why(module).count("no cuSPARSELt") == 2


def test_torch_itself_refuses_the_processor():
    assert "Only CUDA tensors" in packed_or_why(random_linear(WeightSpec(32, 64)))


def test_old_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refusal = SEMI_STRUCTURED_PRODUCTS.refusal(WeightSpec(32, 64), torch.device("cuda"))
    assert refusal.reason == "compute capability 7.5 has no sparse tensor cores, which need 8.0"
