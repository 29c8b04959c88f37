"""Cores without wrappers on grids with minima and super-scales: the descent against its definition, one value at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gram_data import inputs_of, true_error, weight_of
from halfplate.formats.quantizers import QUANTIZERS, storage_of
from halfplate.formats.quantizers.affine import Affine
from halfplate.formats.quantizers.rounding import fit_groups, round_groups
from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native
from halfplate.methods import create
from halfplate.pattern import Pattern
from halfplate.solvers.armor import rows as armor_rows
from halfplate.solvers.armor.full_gram import GramSchedule, solve_gram
from halfplate.solvers.armor.native_affine import affine_numbers
from halfplate.solvers.armor.restarts import Order
from halfplate.solvers.armor.rows import Rounded, RowsProblem, needs_rows
from halfplate.solvers.armor.sweep import Levels
from halfplate.statistics import InputStatistics


def problem_of(name, d_out=6, d_in=80, seed=3):
    gram = inputs_of(d_in, seed).float()
    return RowsProblem(weight_of(d_out, d_in, seed).float(), gram, Levels(QUANTIZERS.get(name), 32))


def rounded(problem):
    """Rounded to nearest, with parameters that can be stored."""
    quantizer = problem.levels.quantizer
    codes, found = round_groups(problem.wanted, quantizer, 32)
    parameters = tuple(part.float() for part in found)
    units = storage_of(quantizer).units(quantizer.stored, parameters)
    each = problem._each(parameters)
    return problem._at(
        Rounded(quantizer.decode(codes.float(), *each), parameters, units, torch.zeros(len(codes), 1).double())
    )


def loss_of(problem, values):
    missing = (problem.wanted - values).double()
    return ((missing @ problem.gram.double()) * missing).sum(1)


@pytest.mark.parametrize("name", ["affine4", "affine2k", "nl4k", "int3k"])
def test_a_sweep_takes_the_best_code_of_one_value_after_the_other(name):
    problem = problem_of(name)
    at, quantizer = rounded(problem), problem.levels.quantizer
    levels = torch.arange(quantizer.range[0], quantizer.range[1] + 1).float()
    values = at.values.clone()
    for row in range(len(values)):
        for column in range(values.shape[1]):
            here = [part[row, column // 32] for part in at.parameters]
            tried = values[row].repeat(len(levels), 1)
            tried[:, column] = quantizer.decode(levels, *here)
            missing = (problem.wanted[row] - tried).double()
            values[row] = tried[((missing @ problem.gram.double()) * missing).sum(1).argmin()]
    found = problem.swept(at).values
    # Of two codes that leave about as much, either may be taken, and those after it follow.
    assert float((found != values).float().mean()) < 0.02
    assert float(loss_of(problem, found).sum()) == pytest.approx(float(loss_of(problem, values).sum()), rel=1e-2)


@pytest.mark.parametrize("name", ["affine4", "affine3k", "nl3k", "int6k"])
def test_refitted_parameters_can_be_stored_and_lower_the_loss_of_every_row(name):
    problem = problem_of(name)
    quantizer, at = problem.levels.quantizer, rounded(problem)
    found = problem.refitted(at)
    assert bool((found.left <= at.left * (1 + 1e-4)).all())
    assert float(found.left.sum()) < float(at.left.sum())
    torch.testing.assert_close(found.left[:, 0].double(), loss_of(problem, found.values), rtol=1e-3, atol=1e-6)
    halves = tuple(part.half() for part in found.parameters)
    assert all(torch.equal(half.float(), part) for half, part in zip(halves, found.parameters, strict=True))
    names, groups = quantizer.stored, halves[0].shape[1]
    storage = storage_of(quantizer)
    again = storage.parameters(names, storage.stored(names, halves), groups)
    assert all(torch.equal(*pair) for pair in zip(again, halves, strict=True))
    codes = quantizer.nearest(found.values, *problem._each(found.parameters))
    torch.testing.assert_close(quantizer.decode(codes, *problem._each(found.parameters)), found.values)


def test_without_storing_the_parameters_of_a_group_are_its_least_squares():
    problem = problem_of("affine4", d_out=3, d_in=32)
    at = rounded(problem)
    found = problem.refitted(at, storable=False)
    codes = problem.levels.quantizer.nearest(at.values, *problem._each(at.parameters)).double() + 8
    root = torch.linalg.cholesky(problem.gram.double())
    for row in range(3):
        bases = torch.stack([codes[row], torch.ones(32, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(root.T @ bases, root.T @ problem.wanted[row, :, None].double()).solution[:, 0]
        torch.testing.assert_close(
            torch.stack([part[row, 0] for part in found.parameters]).double(), best, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("name", ["affine4", "affine4k", "nl4k"])
def test_solved_cores_are_on_their_grid_and_beat_gptq(name):
    weight, gram = weight_of(24, 136, 5), inputs_of(136, 6)
    weight[:, 3], gram[3], gram[:, 3] = 0.5, 0, 0
    spec = WeightSpec(24, 136, Pattern.parse("dense"), name, group=32)
    chain, losses = solve_gram(weight, gram, spec, GramSchedule(grid=8))
    assert {key: (tuple(part.shape), part.dtype) for key, part in chain.tensors().items()} == spec.layout()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(true_error(weight, chain.dense(), gram), rel=0.05)
    gptq = create("gptq").compress(weight, InputStatistics(100, gram.diagonal().float(), gram), spec)
    assert true_error(weight, chain.dense(), gram) < 0.95 * true_error(weight, gptq.weight.dense(), gram)


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
def test_scales_under_super_scales_work_between_wrappers(pattern):
    weight, gram = weight_of(24, 72, 5), inputs_of(72, 6)
    errors = {}
    for name in ("nl4", "nl4k"):
        spec = WeightSpec(24, 72, Pattern.parse(pattern), name, 8, 8, group=32)
        chain, _ = solve_gram(weight, gram, spec, GramSchedule(4, 4, 4))
        assert {key: (tuple(part.shape), part.dtype) for key, part in chain.tensors().items()} == spec.layout()
        errors[name] = true_error(weight, chain.dense(), gram)
    assert errors["nl4k"] < 1.2 * errors["nl4"]


def test_which_quantizers_are_solved_by_rows():
    assert [name for name in QUANTIZERS if needs_rows(QUANTIZERS.get(name))] == [
        name for name in QUANTIZERS if name.startswith("affine") or name.endswith(("k", "s"))
    ]


K_TYPES = [name for name in QUANTIZERS if needs_rows(QUANTIZERS.get(name))]
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())


def both(problem, sweeps):
    """A descent from the best parameters of each group alone: natively, and in torch."""
    quantizer, order = problem.levels.quantizer, Order.of(problem.gram)
    wished = tuple(part.float() for part in fit_groups(problem.wanted, quantizer, problem.levels.group)[1])
    assert affine_numbers(problem.levels) is not None
    return [way(order, wished, sweeps, fits_freely=True) for way in (problem._descended, problem.descended_in_torch)]


def within_groups(gram, group):
    """`gram` without what couples the groups of columns: in any order of the groups, a sweep does the same."""
    place = torch.arange(len(gram)) // group
    return torch.where(place[:, None] == place, gram, 0)


@needs_native
@pytest.mark.parametrize("name", K_TYPES)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 200),
    group=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 99),
    correlated=st.booleans(),
)
@settings(deadline=None, max_examples=8)
def test_a_native_sweep_fits_the_parameters_and_then_the_codes_of_each_group(name, rows, cols, group, seed, correlated):
    gram = (inputs_of(cols, seed) if correlated else torch.eye(cols)).float()
    weight = weight_of(rows, cols, seed)
    weight[0, :group], gram[cols // 2], gram[:, cols // 2] = 0, 0, 0  # a group whose scale is 0, and a dead input
    problem = RowsProblem(weight, within_groups(gram, group), Levels(QUANTIZERS.get(name), group))
    for sweeps in (0, 1):
        found, start = both(problem, sweeps)[0], both(problem, 0)[1].end
        expected = problem.swept(problem.refitted(start)) if sweeps else start
        torch.testing.assert_close(found.end.left[:, 0], loss_of(problem, found.end.values), rtol=1e-3, atol=1e-5)
        # A value half way between two codes may go to either, and those after it follow.
        same = (found.end.left - expected.left).abs() <= 1e-3 * expected.left + 1e-5
        assert float(same.float().mean()) > 0.8 or rows < 10
        assert found.losses[-1] == pytest.approx(float(expected.left.sum()), rel=0.05, abs=1e-5)


@needs_native
@pytest.mark.parametrize("name", ["affine4", "affine2k", "nl4s", "int6k"])
@pytest.mark.parametrize("group", [16, 32])
def test_the_loss_that_native_sweeps_follow_is_that_of_the_values(name, group):
    weight, gram = weight_of(33, 200, 4), inputs_of(200, 5).float()
    problem = RowsProblem(weight, gram, Levels(QUANTIZERS.get(name), group))
    found, _ = both(problem, 4)
    assert found.losses == sorted(found.losses, reverse=True)
    assert found.losses[-1] < 0.95 * found.losses[0]
    torch.testing.assert_close(found.end.left[:, 0], loss_of(problem, found.end.values), rtol=1e-3, atol=1e-5)


@needs_native
@pytest.mark.parametrize("name", K_TYPES)
def test_the_native_parameters_are_those_of_torch(name):
    problem = problem_of(
        name, d_out=33, d_in=31
    )  # one group, so that a sweep fits the parameters of the codes of the start
    order = Order.of(problem.gram)
    wished = tuple(part.float() for part in fit_groups(problem.wanted, problem.levels.quantizer, 32)[1])
    start = problem.descended_in_torch(order, wished, 0, fits_freely=True)
    expected = problem.refitted(start.end).parameters
    (none, _), (one, _) = both(problem, 0), both(problem, 1)
    for native_part, part in zip(none.freely, start.freely, strict=True):
        torch.testing.assert_close(native_part, part, rtol=1e-3, atol=1e-5)
    same = torch.stack([new == part for new, part in zip(one.end.parameters, expected, strict=True)]).all(0)
    assert float(same.float().mean()) > 0.9
    moved = torch.stack([new != part for new, part in zip(one.end.parameters, start.end.parameters, strict=True)])
    assert bool(moved.any())


@needs_native
@pytest.mark.parametrize("name", ["affine4", "affine2k", "nl4s", "int6k"])
def test_native_results_can_be_stored_and_lose_no_more_than_those_of_torch(name, monkeypatch):
    problem = problem_of(name, d_out=96, d_in=272)
    fast, losses = problem.solved(8)
    monkeypatch.setattr(armor_rows, "affine_numbers", lambda _: None)
    slow, _ = problem.solved(8)
    assert losses == sorted(losses, reverse=True)
    # Both end in one of many points where no change of a single code helps.
    assert float(fast.left.sum()) <= 1.03 * float(slow.left.sum())
    quantizer, storage = problem.levels.quantizer, storage_of(problem.levels.quantizer, 32)
    halves = tuple(part.half() for part in fast.parameters)
    again = storage.parameters(quantizer.stored, storage.stored(quantizer.stored, halves), halves[0].shape[1])
    assert all(torch.equal(*pair) for pair in zip(again, halves, strict=True))
    codes = quantizer.nearest(fast.values, *problem._each(fast.parameters))
    torch.testing.assert_close(quantizer.decode(codes, *problem._each(fast.parameters)), fast.values)


@needs_native
@pytest.mark.parametrize("name", ["affine4k", "int3k"])
def test_native_results_do_not_depend_on_threads(name):
    problem, before, found = problem_of(name, d_out=100, d_in=96), torch.get_num_threads(), []
    order = Order.of(problem.gram)  # torch may sum it in another order with more threads
    wished = tuple(part.float() for part in fit_groups(problem.wanted, problem.levels.quantizer, 32)[1])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(problem._descended(order, wished, 3, fits_freely=True))
    torch.set_num_threads(before)
    one, three = found
    assert torch.equal(one.end.values, three.end.values)
    assert all(map(torch.equal, one.end.parameters, three.end.parameters))
    assert all(map(torch.equal, one.freely, three.freely))
    assert one.losses == three.losses


def test_which_quantizers_descend_natively():
    known = {name for name in QUANTIZERS if affine_numbers(Levels(QUANTIZERS.get(name), 32)) is not None}
    assert known >= set(K_TYPES)

    class Doubled(Affine):
        def decode(self, numbers, *parameters):
            return super().decode(numbers, *parameters) + parameters[1]  # twice the minimum

    assert affine_numbers(Levels(Doubled("doubled", 4), 32)) is None
