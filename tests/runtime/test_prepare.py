"""Accelerated models: the same numbers, the same state dictionary, traced whole, taken back bit for bit."""

import copy

import pytest
import torch
from torch import nn

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, CompressedLinear, Permutation, WeightSpec
from halfplate.kernels import native
from halfplate.models.linears import replace_module
from halfplate.pattern import Pattern
from halfplate.runtime import accelerate, explain, restore
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.solvers.selection import keep_largest

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
IDS = torch.arange(3, 20)[None]
SPARSE = Pattern(2, 4)


def compressed(model, core_dtype="bf16", pattern=SPARSE, **more):
    """Every linear of the blocks as a bare core."""
    from halfplate.methods.base import store

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            weight = module.weight.detach()
            spec = WeightSpec(*weight.shape, pattern, core_dtype, **more)
            chain = store(weight, keep_largest(weight.abs(), pattern), spec)
            if spec.permuted:
                chain = Chain.of(spec, chain.core, *chain.outer, Permutation.of(torch.randperm(spec.d_in)))
            replace_module(model, name, CompressedLinear.from_weight(chain, spec, module.bias))
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("core_dtype", ["fp32", "bf16", "int8", "int4", "int3", "int2"])
@torch.no_grad()
def test_an_accelerated_model_computes_the_same(tiny_model, architecture, core_dtype):
    model = compressed(tiny_model(architecture), core_dtype)
    expected, state = model(IDS).logits, model.state_dict()
    accelerate(model, activations="float")
    assert all(isinstance(m, PackedLinear) for n, m in model.named_modules() if n.endswith("_proj"))
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    # A tied head is a second name for the embedding, which alone is saved.
    assert state.keys() - after.keys() <= {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.items())
    restore(model)
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_packed_weights_are_the_only_ones(tiny_model):
    model = compressed(tiny_model(tie_word_embeddings=True))
    linears = sum(t.nbytes for m in model.modules() if isinstance(m, CompressedLinear) for t in m.stored().values())
    accelerate(model)
    names = {name for name, _ in model.named_parameters()}
    assert not any("proj" in name or "lm_head" in name for name in names)
    packed = sum(m.packed.nbytes for n, m in model.named_modules() if isinstance(m, PackedLinear) and "proj" in n)
    # Tiny matrices are padded to whole bands; a header and alignment come on top.
    assert packed <= 1.5 * linears + 14 * 1024


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_an_embedding_that_bf16_holds_is_kept_in_bf16(tiny_model, tied):
    model = tiny_model(tie_word_embeddings=tied)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    expected, state = model(IDS).logits, model.state_dict()
    accelerate(model, activations="float")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    restore(model)
    assert torch.equal(model(IDS).logits, expected)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_int8_activations_are_for_grids_and_near(tiny_model):
    model = compressed(tiny_model(), "int8")
    with torch.no_grad():
        expected = model(IDS).logits
        report = accelerate(model, activations="int8")
        found = model(IDS).logits
    assert "int8 activations" in str(report)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pattern": Pattern(4, 8)}, "pattern 4:8"),
        ({"permuted": True}, "permuted inputs"),
    ],
)
def test_what_has_no_kernel_keeps_the_torch_path_and_says_why(tiny_model, options, reason):
    model = compressed(tiny_model(), **options)
    with torch.no_grad():
        expected = model(IDS).logits
        report = accelerate(model)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert f"14 linears: torch (no kernel for {reason})" in str(report)
    assert "is not in kernel layout" in report.decoder
    assert str(explain(model)) == str(report)


def test_a_head_can_be_rounded_and_is_not_saved_so(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():
        expected = model(IDS).logits
        accelerate(model, head_dtype="int8")
        found = model(IDS).logits
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert "lm_head.weight" not in model.state_dict()


@pytest.mark.parametrize(("option", "value"), [("activations", "int4"), ("head_dtype", "int2"), ("dense_dtype", "x")])
def test_unknown_options_are_refused(tiny_model, option, value):
    with pytest.raises(HalfplateError, match=f"'{value}' is not one of"):
        accelerate(tiny_model(), **{option: value})


def test_moving_and_training_packed_weights_is_refused_with_the_cure(tiny_model):
    model = compressed(tiny_model())
    accelerate(model)
    with pytest.raises(HalfplateError, match="restore"):
        model.to("meta")
    with pytest.raises(HalfplateError, match="restore"):
        model.load_state_dict(model.state_dict())


def test_gradients_reach_inputs_through_packed_linears(tiny_model):
    model = compressed(tiny_model())
    reference = copy.deepcopy(model)
    accelerate(model)
    grads = []
    for one in (model, reference):
        embedded = one.get_input_embeddings()(IDS).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().sum().backward()
        grads.append(embedded.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_copies_are_independent(tiny_model):
    model = compressed(tiny_model())
    accelerate(model)
    twin = copy.deepcopy(model)
    restore(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", ["float", "int8"])
@torch.no_grad()
def test_compile_and_export_trace_through(activations):
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    spec = WeightSpec(24, 64, Pattern(2, 4), "int8")
    from halfplate.methods.base import store

    chain = store(linear.weight.detach(), keep_largest(linear.weight.detach().abs(), spec.pattern), spec)
    assert isinstance(chain, Chain)
    packed = PackedLinear.of_compressed(CompressedLinear.from_weight(chain, spec, linear.bias), activations)
    x = torch.randn(2, 5, 64)
    expected = packed(x)
    compiled = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected.relu())
    exported = torch.export.export(
        packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    )
    # Compared at the same number of tokens: from 16 on, sums have another order.
    twice = torch.cat([x, x])
    assert torch.equal(exported.module()(twice), packed(twice))
    torch.testing.assert_close(packed(twice), torch.cat([expected, expected]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_linears_answer_for_their_weight(tiny_model, dtype):
    """Codes are int8 or less in memory; what the model computes in is `dtype`."""
    model = compressed(tiny_model("qwen2"), "int8").to(dtype)
    names = [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
    biases = {name: model.get_submodule(name).bias for name in names}
    accelerate(model)
    for name in [*names, "lm_head"]:
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        assert (packed.weight.dtype, packed.weight.device.type) == (dtype, "cpu")
        assert tuple(packed.weight.shape) == (packed.out_features, packed.in_features)
        with pytest.raises(HalfplateError, match="needs the values of a weight"):
            packed.weight.float()
    for name, bias in biases.items():
        found = model.get_submodule(name).bias
        assert found is bias if bias is None else torch.equal(found, bias)
