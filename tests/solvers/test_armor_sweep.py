"""The sweep over the core: a scalar reference, the torch version and the native version."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native
from halfplate.pattern import Pattern
from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.stages import NativeStages, TorchStages
from halfplate.solvers.armor.sweep import sweep_tiles

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")


def make_problem(d_out, d_in, out_block, in_block, pattern, seed, integer=False, dead=0):
    generator = torch.Generator().manual_seed(seed)
    if integer:
        weight = torch.randint(-4, 5, (d_out, d_in), generator=generator).float()
        moment = torch.randint(0, 4, (d_in,), generator=generator).float()
    else:
        weight = torch.randn(d_out, d_in, generator=generator)
        moment = torch.rand(d_in, generator=generator) * 3
    moment[:dead] = 0
    spec = WeightSpec(d_out, d_in, Pattern.parse(pattern), "fp32", out_block, in_block, "fp32")
    return Problem.from_weight(weight, moment, spec)


def disturbed(problem, seed, integer=False):
    """Factors that are not the start: wrappers away from the identity."""
    generator = torch.Generator().manual_seed(seed)
    factors = problem.start()
    for blocks in (factors.out_blocks, factors.in_blocks):
        if integer:
            blocks += torch.randint(-1, 2, blocks.shape, generator=generator).float()
        else:
            blocks += 0.2 * torch.randn(blocks.shape, generator=generator)
    return factors


def copied(factors):
    return Factors(factors.out_blocks, factors.core.clone(), factors.in_blocks)


def loss_of(problem, factors):
    error = problem.weight.double() - dense(factors)
    return float((error.square() * problem.moment.double()).sum())


def dense(factors):
    out, within = torch.block_diag(*factors.out_blocks.double()), torch.block_diag(*factors.in_blocks.double())
    return out @ factors.core.double() @ within


def naive_sweep(problem, factors):
    """Coordinate descent in fp64 that measures every candidate by the loss of its tile, one group after the other."""
    core = factors.core.double().clone()
    pattern, to, ti = problem.pattern, problem.row_tile, problem.col_tile
    for i in range(problem.row_tiles):
        for j in range(problem.col_tiles):
            rows, cols = slice(i * to, (i + 1) * to), slice(j * ti, (j + 1) * ti)
            a, b = factors.out_blocks[i].double(), factors.in_blocks[j].double()
            weight, moment = problem.weight[rows, cols].double(), problem.moment[cols].double()

            def tile_loss(tile, weight=weight, a=a, b=b, moment=moment):
                return float(((weight - a @ tile @ b).square() * moment).sum())

            tile = core[rows, cols]
            for r in range(to):
                for start in range(0, ti, pattern.m):
                    best, best_loss = tile.clone(), tile_loss(tile)
                    for mask in combinations(range(pattern.m), pattern.n):
                        candidate = tile.clone()
                        candidate[r, start : start + pattern.m] = 0
                        # Every kept value moves the tile along A[:, r] B[c, :]; least squares over those directions.
                        directions = torch.stack([torch.outer(a[:, r], b[start + c]) * moment.sqrt() for c in mask])
                        target = (weight - a @ candidate @ b) * moment.sqrt()
                        basis = directions.flatten(1).T
                        values = torch.linalg.lstsq(basis, target.flatten()[:, None], driver="gelsd").solution[:, 0]
                        for c, value in zip(mask, values, strict=True):
                            candidate[r, start + c] = value
                        if tile_loss(candidate) < best_loss * (1 - 1e-9):
                            best, best_loss = candidate, tile_loss(candidate)
                    tile.copy_(best)
    return Factors(factors.out_blocks, core.float(), factors.in_blocks)


@pytest.mark.parametrize(("pattern", "block"), [("2:4", 4), ("2:4", 8), ("1:4", 8), ("2:3", 6)])
def test_torch_sweep_matches_scalar_reference(pattern, block):
    problem = make_problem(8, 2 * block, block, block, pattern, seed=1)
    factors = disturbed(problem, seed=2)
    expected, found = naive_sweep(problem, factors), copied(factors)
    TorchStages().sweep(problem, found)
    assert torch.equal(expected.core != 0, found.core != 0)
    assert loss_of(problem, found) == pytest.approx(loss_of(problem, expected), rel=1e-4)


shapes = st.tuples(
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([0, 1, 4, 7, 16, 64]),
    st.sampled_from([0, 1, 4, 12, 16, 64]),
)


@needs_native
@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**20), st.booleans())
def test_native_sweep_equals_torch_on_2_4(shape, seed, integer):
    d_out, groups, out_block, in_block = shape
    # Two live inputs in a group make all its masks equally good, and which rounding error decides is nobody's business.
    dead = min(3, groups) if integer else 0
    problem = make_problem(d_out, 4 * groups, out_block, in_block, "2:4", seed, integer, dead)
    first = problem.start() if integer else disturbed(problem, seed + 1)
    second = copied(first)
    before = loss_of(problem, first)
    assert NativeStages().sweep(problem, first) == pytest.approx(before, rel=1e-5, abs=1e-6)
    assert TorchStages().sweep(problem, second) == pytest.approx(before, rel=1e-5, abs=1e-6)
    total = problem.zero_loss()
    assert loss_of(problem, first) == pytest.approx(loss_of(problem, second), rel=1e-5, abs=1e-6 * max(total, 1e-30))
    assert loss_of(problem, first) <= before * (1 + 1e-6) + 1e-7 * total
    if integer:
        assert torch.equal(first.core != 0, second.core != 0)


@pytest.mark.parametrize("stages", [pytest.param(NativeStages(), marks=needs_native), TorchStages()])
@pytest.mark.parametrize("dead", [1, 2, 3, 4, 9, 32])
def test_dead_inputs_never_raise_the_loss(stages, dead):
    problem = make_problem(20, 32, 8, 8, "2:4", seed=dead, dead=dead)
    factors = disturbed(problem, seed=1)
    before = loss_of(problem, factors)
    for _ in range(3):
        stages.sweep(problem, factors)
        after = loss_of(problem, factors)
        assert after <= before * (1 + 1e-6)
        before = after
    assert bool(factors.core.isfinite().all())


@needs_native
@pytest.mark.parametrize("block", [4, 8, 16, 20, 32])
def test_native_masks_are_bit_equal_on_integer_data(block):
    """Integer wrappers make every product exact until the first division, so ties must break alike."""
    problem = make_problem(2 * block, 3 * block, block, block, "2:4", seed=block, integer=True)
    first = disturbed(problem, seed=3, integer=True)
    second = copied(first)
    NativeStages().sweep(problem, first)
    TorchStages().sweep(problem, second)
    assert torch.equal(first.core != 0, second.core != 0)


@needs_native
@pytest.mark.parametrize("pattern", ["1:2", "1:4", "3:4", "2:5", "4:8", "3:6", "8:16", "1:8", "16:32"])
def test_native_sweep_equals_torch_on_other_patterns(pattern):
    m = Pattern.parse(pattern).m
    problem = make_problem(20, 3 * m, 8, m, pattern, seed=4)
    first = disturbed(problem, seed=5)
    second, before = copied(first), loss_of(problem, first)
    NativeStages().sweep(problem, first)
    TorchStages().sweep(problem, second)
    assert loss_of(problem, first) == pytest.approx(loss_of(problem, second), rel=1e-5)
    assert loss_of(problem, first) < before
    groups = (first.core != 0).reshape(first.core.shape[0], -1, m).sum(-1)
    assert int(groups.max()) <= Pattern.parse(pattern).n


@needs_native
@pytest.mark.parametrize("stage", ["output_moments", "input_moments"])
@pytest.mark.parametrize("blocks", [(16, 16), (8, 32), (48, 4), (0, 1), (24, 12), (128, 128)])
def test_native_moments_equal_torch(stage, blocks):
    problem = make_problem(50, 84, *blocks, "2:4", seed=6)
    factors = disturbed(problem, seed=7)
    found, expected = (getattr(stages, stage)(problem, factors) for stages in (NativeStages(), TorchStages()))
    for name in ("cross", "square", "tile_losses"):
        ours, reference = getattr(found, name), getattr(expected, name)
        assert torch.allclose(ours, reference, rtol=1e-4, atol=2e-6 * float(reference.abs().max())), name
    assert found.loss == pytest.approx(loss_of(problem, factors), rel=1e-6)


@needs_native
def test_native_result_does_not_depend_on_threads():
    problem = make_problem(70, 172, 16, 16, "2:4", seed=8)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            factors = disturbed(problem, seed=9)
            NativeStages().sweep(problem, factors)
            moments = NativeStages().output_moments(problem, factors)
            inputs = NativeStages().input_moments(problem, factors)
            results.append((factors.core, moments.cross, moments.square, inputs.cross, inputs.square))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert torch.equal(ours, first)


def test_sweep_leaves_dead_rows_and_columns_alone():
    core = torch.ones(1, 4, 4)
    swept = sweep_tiles(core, torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), Pattern(2, 4))
    assert torch.equal(swept, core)
