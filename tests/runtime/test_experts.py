"""Experts that run together, against the same experts one by one."""

import copy
from unittest import mock

import pytest
import torch
from stored_linears import random_linear
from torch import nn

from causal_models import MOE
from conftest import build_model
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.kernels import native
from halfplate.models.experts import experts_of, linear_experts
from halfplate.models.linears import replace_module
from halfplate.pattern import DENSE, Pattern
from halfplate.runtime import accelerate, explain, restore
from halfplate.runtime.backends.cpu import PackedLinear

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

# Gated, with clamps and biases and interleaved, and without a gate.
MIXTURES = {"qwen3_moe": MOE | {"head_dim": 8}, "gpt_oss": MOE | {"head_dim": 8}, "mixtral": MOE}
FIRST = "model.layers.0.mlp.experts"
CORES = [
    WeightSpec(16, 32, DENSE, "int4", group=32),
    WeightSpec(16, 32, Pattern(2, 4), "bf16", 4, 8),
    WeightSpec(16, 32, Pattern(2, 4), "nl4", 16, 16, "int8", group=32),
]


def mixture(architecture="qwen3_moe"):
    return linear_experts(build_model(architecture, **MIXTURES[architecture]))


@pytest.fixture
def model():
    found = mixture()
    accelerate(found)
    return found


def experts(model):
    return experts_of(model)[FIRST]


def one_by_one(module, *args):
    with mock.patch("halfplate.models.experts.module.rows_in_group", return_value=0):
        return module(*args)


def routed(tokens, chosen=None, seed=0, experts=8):
    """Random hidden states (tokens, 32), two experts of each token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 32, generator=generator)
    if chosen is None:
        chosen = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :2]
    return hidden, chosen, torch.rand(chosen.shape, generator=generator)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("tokens", [1, 7, 90])  # of 90, some experts get so many that they run alone
@torch.no_grad()
def test_models_give_the_same_logits(architecture, tokens):
    model, ids = mixture(architecture), torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    accelerate(model)
    torch.testing.assert_close(model(ids).logits, one_by_one(model, ids).logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


CHOSEN = {
    "one token": torch.tensor([[6, 1]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "all tokens to one expert": torch.full((9, 1), 3),
    "an expert without tokens": torch.tensor([[0, 1], [1, 2], [7, 0]]),
    "a number beyond the experts": torch.tensor([[0, 8], [8, 8], [-1, 2]]),
    "the same expert twice": torch.tensor([[5, 5]]),
    "many tokens to one expert": torch.stack([torch.full((130,), 4), torch.arange(130) % 3], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@torch.no_grad()
def test_any_routing(chosen, dtype, model):
    hidden, chosen, weights = routed(len(chosen), chosen)
    found = experts(model)(hidden.to(dtype), chosen, weights.to(dtype))
    expected = one_by_one(experts(model), hidden.to(dtype), chosen, weights.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_only_the_matrices_of_the_experts_of_a_token_are_read(model):
    module, read = experts(model), []

    def multiplied(x, packed, counts, widths):
        read.extend(matrix.data_ptr() for matrices in packed for matrix in matrices)
        return original(x, packed, counts, widths)

    from halfplate.models.experts import group

    original = group.multiply_group
    with (
        mock.patch.object(group, "multiply_group", multiplied),
        mock.patch.object(PackedLinear, "forward", side_effect=AssertionError("an expert ran alone")),
    ):
        module(*routed(1, CHOSEN["one token"]))
    wanted = [getattr(module.expert(n), leaf).packed for leaf in ("gate_proj", "up_proj", "down_proj") for n in (1, 6)]
    assert sorted(read) == sorted(matrix.data_ptr() for matrix in wanted)
    assert len(read) == 6


@torch.no_grad()
def test_experts_of_different_cores_run_together_and_those_without_a_kernel_alone():
    model = mixture()
    for number, spec in enumerate(CORES):
        linear = CompressedLinear.from_stored(random_linear(spec, number), spec, None)
        replace_module(model, f"{FIRST}.{number}.up_proj", linear)
    accelerate(model)
    args = routed(20)
    torch.testing.assert_close(experts(model)(*args), one_by_one(experts(model), *args))
    assert "2 modules of experts: in one call\n" in str(explain(model))
    name = f"{FIRST}.7.gate_proj"
    model.set_submodule(name, model.get_submodule(name).restored())
    reason = "1 of 8 experts have linears that are not in kernel layout, and run one by one"
    assert f"1 modules of experts: in one call ({reason})" in str(explain(model))
    torch.testing.assert_close(experts(model)(*args), one_by_one(experts(model), *args))


@torch.no_grad()
def test_a_hook_on_a_linear_sees_its_inputs(model):
    module, seen = experts(model), []
    expected = module(*routed(6))
    module.expert(0).down_proj.register_forward_hook(lambda linear, args, output: seen.append(args[0]))
    torch.testing.assert_close(module(*routed(6)), expected)
    assert sum(map(len, seen)) == int((routed(6)[1] == 0).sum())


@torch.no_grad()
def test_nan_stays_with_its_token(model):
    hidden, chosen, weights = routed(12)
    hidden[5, 3] = torch.nan
    found = experts(model)(hidden, chosen, weights)
    own = torch.arange(12) == 5
    assert found[own].isnan().all()
    assert found[~own].isfinite().all()


def test_gradients_reach_the_inputs(model):
    hidden, chosen, weights = routed(4)
    found, alone = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    experts(model)(found, chosen, weights).sum().backward()
    one_by_one(experts(model), alone, chosen, weights).sum().backward()
    assert torch.equal(found.grad, alone.grad)
    assert found.grad.abs().sum() > 0


@torch.no_grad()
def test_copies_and_restored_models_run(model):
    args = routed(5)
    expected = experts(model)(*args)
    assert torch.equal(experts(copy.deepcopy(model))(*args), expected)
    restore(model)
    assert isinstance(experts(model).expert(0).up_proj, nn.Linear)
    assert "2 modules of experts: one by one (8 of 8 experts" in str(explain(model))
    torch.testing.assert_close(experts(model)(*args), expected, rtol=1e-5, atol=1e-6)
