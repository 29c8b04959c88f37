"""The exact solver: monotone, never above NoWag-P, stationary, and sound on hostile input."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native
from halfplate.pattern import Pattern
from halfplate.solvers.armor.exact import solve_exact
from halfplate.solvers.armor.problem import Problem, Wrapper
from halfplate.solvers.armor.stages import NativeStages, TorchStages, stages_for
from halfplate.solvers.armor.wrappers import update_in_blocks, update_out_blocks
from halfplate.solvers.normalise import normalise

CPU = torch.device("cpu")


def problem_of(weight, moment, block, pattern="2:4"):
    spec = WeightSpec(*weight.shape, Pattern.parse(pattern), "fp32", block, block, "fp32")
    return Problem.from_weight(normalise(weight).weight, moment, spec)


def correlated(d_out, d_in, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    return torch.randn(d_out, d_in, generator=generator) @ mix, torch.rand(d_in, generator=generator) ** 3


def assert_monotone(problem, losses, factors):
    error = problem.weight.double() - factors.product().double()
    stored = float((error.square() * problem.moment.double()).sum()) / problem.zero_loss()
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(losses))
    assert stored == pytest.approx(losses[-1], rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 10),
    st.sampled_from([0, 1, 4, 8, 16, 64]),
    st.integers(0, 10_000),
    st.integers(0, 8),
)
def test_loss_never_rises(d_out, groups, block, seed, dead):
    weight, moment = correlated(d_out, 4 * groups, seed)
    moment[:dead] = 0
    weight[: d_out // 5] = 0
    problem = problem_of(weight, moment, block)
    if problem.zero_loss() == 0:
        return
    factors, losses = solve_exact(problem, 8, stages_for(CPU))
    assert_monotone(problem, losses, factors)


@pytest.mark.parametrize("stages", [TorchStages(), NativeStages()], ids=["torch", "native"])
def test_start_is_nowag_and_end_is_far_below(stages):
    if isinstance(stages, NativeStages) and not native.available():
        pytest.skip(f"no native kernels: {native.reason()}")
    weight, moment = correlated(48, 64, seed=1)
    problem = problem_of(weight, moment, 16)
    normalised = normalise(weight)
    score = (normalised.weight.square() * moment).reshape(48, -1, 4)
    dropped = score.sort(-1).values[..., :2].sum()  # NoWag-P loses the two least scores of each group
    factors, losses = solve_exact(problem, 20, stages)
    assert losses[0] == pytest.approx(float(dropped) / problem.zero_loss(), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert_monotone(problem, losses, factors)


def test_native_and_torch_take_the_same_way():
    if not native.available():
        pytest.skip(f"no native kernels: {native.reason()}")
    weight, moment = correlated(32, 48, seed=2)
    problem = problem_of(weight, moment, 16)
    _, native_losses = solve_exact(problem, 6, NativeStages())
    _, torch_losses = solve_exact(problem, 6, TorchStages())
    assert native_losses == pytest.approx(torch_losses, rel=1e-3)


def test_wrapper_updates_are_stationary():
    """After an update the gradient with respect to that wrapper vanishes."""
    weight, moment = correlated(32, 32, seed=3)
    problem = problem_of(weight, moment, 8)
    stages, factors = TorchStages(), problem.start()
    before = stages.output_moments(problem, factors)
    factors.out_blocks = update_out_blocks(factors.out_blocks, before, Wrapper.BLOCKS)
    after = stages.output_moments(problem, factors)
    assert after.loss < before.loss
    assert float(after.cross.abs().max()) < 1e-4 * float(before.cross.abs().max())
    before = stages.input_moments(problem, factors)
    factors.in_blocks = update_in_blocks(factors.in_blocks, before, Wrapper.BLOCKS)
    after = stages.input_moments(problem, factors)
    assert after.loss < before.loss
    assert float(after.cross.abs().max()) < 1e-4 * float(before.cross.abs().max())


@pytest.mark.parametrize(
    "case", ["zero weight", "zero moment", "one input", "constant", "tiny", "huge", "massive channel"]
)
def test_hostile_input_stays_finite(case):
    weight, moment = correlated(24, 32, seed=4)
    if case == "zero weight":
        weight = torch.zeros_like(weight)
    elif case == "zero moment":
        moment = torch.zeros_like(moment)
    elif case == "one input":
        moment = torch.zeros_like(moment)
        moment[5] = 1
    elif case == "constant":
        weight = torch.ones_like(weight)
    elif case == "tiny":
        weight = weight * 1e-30
    elif case == "huge":
        weight = weight * 1e30
    else:
        moment[7] = 1e9
    problem = problem_of(weight, moment, 16)
    factors, losses = solve_exact(problem, 5, stages_for(CPU))
    for tensor in (factors.out_blocks, factors.core, factors.in_blocks):
        assert bool(tensor.isfinite().all())
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(losses))


def test_every_matrix_of_a_trained_model(stories260k):
    """Monotone and below NoWag-P on all 35 matrices of stories260K."""
    weights = load_file(stories260k / "model.safetensors")
    names = [name for name in weights if name.endswith("_proj.weight")]
    assert len(names) == 35
    for number, name in enumerate(names):
        weight = weights[name].float()
        moment = correlated(1, weight.shape[1], seed=number)[1]
        problem = problem_of(weight, moment, 16)
        factors, losses = solve_exact(problem, 10, stages_for(CPU))
        assert losses[-1] < losses[0]
        assert_monotone(problem, losses, factors)
