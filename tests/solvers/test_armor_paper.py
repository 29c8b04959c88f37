"""The published algorithm: start, gradients, bookkeeping of the sampled groups, patience."""

import pytest
import torch

from halfplate.formats.spec import WeightSpec
from halfplate.pattern import Pattern
from halfplate.solvers.armor.paper import PaperRun, PaperSchedule, solve_paper
from halfplate.solvers.armor.problem import Problem
from halfplate.solvers.normalise import normalise


def make_problem(d_out=40, d_in=48, out_block=16, in_block=8, pattern="2:4", seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    moment = torch.rand(d_in, generator=generator)
    moment[3] = 0
    spec = WeightSpec(d_out, d_in, Pattern.parse(pattern), "fp32", out_block, in_block, "fp32")
    return Problem.from_weight(normalise(weight).weight, moment, spec)


def test_starts_at_nowag_loss_exactly():
    problem = make_problem()
    start = problem.start()
    nowag = (problem.weight - start.core).double().square() * problem.moment
    _, losses = solve_paper(problem, PaperSchedule(iterations=3))
    assert losses[0] == pytest.approx(float(nowag.sum()) / problem.zero_loss(), rel=1e-12)


def test_adam_follows_the_gradient_of_the_loss():
    """The first Adam step moves every parameter by the learning rate against the sign of autograd's gradient."""
    problem = make_problem()
    run = PaperRun(problem, PaperSchedule(learning_rate=1e-3))
    # At the identity the kept values are stationary, so the wrappers are moved away from it first.
    generator = torch.Generator().manual_seed(1)
    for blocks in (run.factors.out_blocks, run.factors.in_blocks):
        blocks += 0.1 * torch.randn(blocks.shape, generator=generator)
    run._forward()
    parts = (run.factors.out_blocks, run.factors.core, run.factors.in_blocks)
    parameters = [tensor.clone().requires_grad_() for tensor in parts]
    kept = run.factors.core != 0
    product = torch.block_diag(*parameters[0]) @ parameters[1] @ torch.block_diag(*parameters[2])
    ((problem.weight - product).square() * problem.moment).sum().backward()
    run._continuous_step()
    for parameter, now, mask in zip(parameters, parts, (None, kept, None), strict=True):
        gradient = parameter.grad if mask is None else parameter.grad * mask
        clear = gradient.abs() > 0.05 * gradient.abs().max()  # far above Adam's eps and rounding
        step = now - parameter.detach()
        assert bool(clear.any())
        assert torch.allclose(step[clear], -1e-3 * gradient[clear].sign(), atol=1e-6)
        if mask is not None:
            assert torch.equal(now != 0, mask)


@pytest.mark.parametrize("blocks", [(16, 8), (0, 16), (1, 1), (64, 64)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_bookkeeping_equals_a_fresh_forward(blocks, pattern):
    problem = make_problem(out_block=blocks[0], in_block=blocks[1], pattern=pattern)
    run = PaperRun(problem, PaperSchedule(learning_rate=1e-2))
    for _ in range(5):
        run.step()
    kept = {name: getattr(run, name).clone() for name in ("right", "residual", "weighted", "pulled", "error")}
    run._forward()
    for name, tensor in kept.items():
        assert torch.allclose(tensor, getattr(run, name), atol=1e-5), name
    kept_a_group = (run.factors.core != 0).reshape(problem.weight.shape[0], -1, problem.pattern.m).sum(-1)
    assert int(kept_a_group.max()) <= problem.pattern.n


def test_discrete_step_changes_one_group_a_tile_and_never_raises_the_loss():
    problem = make_problem()
    run = PaperRun(problem, PaperSchedule(learning_rate=1e-2))
    for _ in range(3):
        run.step()  # at the identity no group has anything to gain
    first = run.loss
    for _ in range(10):
        before, core = run.loss, run.factors.core.clone()
        run._discrete_step()
        assert run.loss <= before * (1 + 1e-6)
        changed = (run.factors.core != core).reshape(problem.row_tiles, problem.row_tile, problem.col_tiles, -1, 4)
        a_tile = changed.any(-1).permute(0, 2, 1, 3).flatten(2).sum(-1)  # changed groups of each tile
        assert int(a_tile.max()) <= 1
    assert run.loss < first


def test_same_seed_same_run_and_other_seed_other_run():
    problem = make_problem()
    first, second, other = (solve_paper(problem, PaperSchedule(iterations=20, seed=s))[1] for s in (1, 1, 2))
    assert first == second
    assert first != other


def test_loss_falls_and_patience_ends_the_run():
    problem = make_problem()
    _, losses = solve_paper(problem, PaperSchedule(iterations=300, learning_rate=1e-3))
    assert losses[-1] < 0.7 * losses[0]
    _, losses = solve_paper(problem, PaperSchedule(iterations=300, tolerance=0.9, patience=7))
    assert len(losses) == 1 + 7


def test_identity_wrappers_stay():
    problem = make_problem(out_block=0, in_block=0)
    factors, losses = solve_paper(problem, PaperSchedule(iterations=10))
    assert torch.equal(factors.out_blocks, problem.start().out_blocks)
    assert torch.equal(factors.in_blocks, problem.start().in_blocks)
    # Without wrappers the kept values of W are optimal already, so only ties move.
    assert losses[-1] == pytest.approx(losses[0], rel=1e-2)
