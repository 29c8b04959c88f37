"""ARMOR as a method: stored tensors, rounding repaired by the wrappers, block sizes and their edges."""

from dataclasses import replace

import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.formats import NMSparse, WeightSpec
from halfplate.methods import create
from halfplate.pattern import Pattern
from halfplate.statistics import InputStatistics


def case(d_out=40, d_in=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    weight = torch.randn(d_out, d_in, generator=generator) @ mix
    inputs = torch.randn(4 * d_in, d_in, generator=generator) @ (
        torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    )
    inputs *= torch.rand(d_in, generator=generator)
    gram = inputs.double().T @ inputs.double() / len(inputs)
    return weight, InputStatistics(len(inputs), gram.diagonal().float(), gram)


def diagonal_armor(**options):
    return create("armor", objective="diag", **options)


def spec_of(weight, out_block=16, in_block=16, core="fp32", wrapper="fp32", pattern="2:4"):
    return WeightSpec(*weight.shape, Pattern.parse(pattern), core, out_block, in_block, wrapper)


def proxy_error(weight, statistics, chain):
    """The objective of the paper: errors of the normalised weight, weighted by the second moments."""
    columns = weight.norm(dim=0)
    rows = (weight / columns).norm(dim=1, keepdim=True)
    error = (weight - chain.dense()) / columns / rows
    start = weight / columns / rows
    return float((error.square() * statistics.diagonal).sum() / (start.square() * statistics.diagonal).sum())


@pytest.mark.parametrize(("out_block", "in_block"), [(16, 16), (8, 16), (0, 16), (16, 0), (1, 8), (64, 128), (12, 20)])
@pytest.mark.parametrize("options", [{}, {"objective": "diag"}, {"solver": "paper"}], ids=["gram", "diag", "paper"])
def test_stored_tensors_have_the_promised_layout(out_block, in_block, options):
    weight, statistics = case()
    spec = spec_of(weight, out_block, in_block, "bf16", "bf16")
    solution = create("armor", **options, iterations=3).compress(weight, statistics, spec)
    tensors = solution.weight.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.layout()
    assert solution.weight.nbytes == spec.nbytes


def test_fp32_storage_keeps_the_loss_of_the_solver():
    weight, statistics = case()
    solution = diagonal_armor(iterations=10).compress(weight, statistics, spec_of(weight))
    # The last updates of B and A on the way to storage can only lower it.
    assert proxy_error(weight, statistics, solution.weight) <= solution.losses[-1] * (1 + 1e-5)


def test_wrappers_repair_rounding():
    weight, statistics = case(96, 128)
    fine = diagonal_armor(iterations=30).compress(weight, statistics, spec_of(weight))
    coarse = diagonal_armor(iterations=30).compress(weight, statistics, spec_of(weight, core="bf16", wrapper="bf16"))
    naive = fine.weight.core.values.bfloat16().float()
    outer = tuple(type(w)(w.blocks.bfloat16().float(), None) for w in fine.weight.outer)
    blunt = replace(fine.weight, core=replace(fine.weight.core, stored=naive), outer=outer)
    assert proxy_error(weight, statistics, coarse.weight) <= proxy_error(weight, statistics, blunt) * (1 + 1e-4)


@pytest.mark.parametrize("core", ["int8", "int4", "int3"])
@pytest.mark.parametrize("wrapper", ["bf16", "int8"])
def test_wrappers_repair_the_grid_of_the_core(core, wrapper):
    weight, statistics = case(96, 128)
    fine = diagonal_armor(iterations=30).compress(weight, statistics, spec_of(weight))
    coarse = diagonal_armor(iterations=30).compress(weight, statistics, spec_of(weight, core=core, wrapper=wrapper))
    chain = fine.weight
    rounded = NMSparse.from_dense(chain.core.dense(), chain.core.mask(), chain.core.pattern, core)
    wrappers = tuple(type(kept).from_padded(kept.blocks, kept.size, 16, wrapper) for kept in chain.outer)
    blunt = replace(chain, core=rounded, outer=wrappers)
    errors = [proxy_error(weight, statistics, one) for one in (chain, coarse.weight, blunt)]
    assert errors[0] * (1 - 1e-3) <= errors[1]
    assert errors[1] <= errors[2] * (1 + 1e-3)


@pytest.mark.parametrize("block", [1, 12])
def test_int8_wrappers_of_every_size(block):
    weight, statistics = case(40, 60)
    spec = spec_of(weight, block, block, "int4", "int8")
    solution = diagonal_armor(iterations=3).compress(weight, statistics, spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in solution.weight.tensors().items()} == spec.layout()
    exact = diagonal_armor(iterations=3).compress(weight, statistics, spec_of(weight, block, block, "int4", "fp32"))
    errors = [proxy_error(weight, statistics, one.weight) for one in (solution, exact)]
    assert errors[0] <= errors[1] * 1.02


@pytest.mark.parametrize("objective", ["gram", "diag"])
def test_an_input_of_hardly_any_energy_does_not_spoil_int8_wrappers(objective):
    weight, statistics = case(96, 128)
    small = torch.ones(128)
    small[37] = 1e-3
    gram = statistics.require_gram() * small[:, None] * small
    faint = InputStatistics(statistics.tokens, gram.diagonal().float(), gram)
    errors = []
    for wrapper in ("int8", "fp32"):
        solution = create("armor", objective=objective, iterations=8).compress(
            weight, faint, spec_of(weight, core="fp32", wrapper=wrapper)
        )
        difference = (weight - solution.weight.dense()).double()
        errors.append(float((difference @ gram * difference).sum()))
    assert errors[0] <= errors[1] * 1.2


def test_larger_blocks_lose_less():
    weight, statistics = case(64, 128)
    errors = [
        proxy_error(weight, statistics, diagonal_armor().compress(weight, statistics, spec_of(weight, b, b)).weight)
        for b in (0, 4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)


def test_without_wrappers_it_is_nowag():
    weight, statistics = case()
    bare = diagonal_armor().compress(weight, statistics, spec_of(weight, 0, 0))
    nowag = create("nowag").compress(weight, statistics, spec_of(weight, 0, 0))
    assert torch.allclose(bare.weight.dense(), nowag.weight.dense(), rtol=1e-5)


def test_balanced_factors_survive_fp16():
    weight, statistics = case()
    scales = torch.logspace(-12, 4, weight.shape[0])[:, None]  # no balance: rows of S or A would leave fp16
    solution = diagonal_armor().compress(weight * 1e-2, statistics, spec_of(weight, core="fp16", wrapper="fp16"))
    assert solution.weight.core.values.isfinite().all()
    with pytest.raises(HalfplateError, match="core_dtype='fp16' cannot hold"):
        diagonal_armor().compress(weight * scales * 1e4, statistics, spec_of(weight, core="fp16", wrapper="fp16"))


def test_scale_of_the_weight_and_of_the_moments_is_irrelevant():
    weight, statistics = case()
    spec = spec_of(weight)
    plain = diagonal_armor(iterations=5).compress(weight, statistics, spec)
    scaled = diagonal_armor(iterations=5).compress(
        weight * 1024, InputStatistics(100, statistics.diagonal * 4096), spec
    )
    assert torch.allclose(plain.weight.dense() * 1024, scaled.weight.dense(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "exat"}, "solver='exat' is not one of exact, paper"),
        ({"objective": "full"}, "objective='full' is not one of gram, diag"),
        ({"objective": "gram", "solver": "paper"}, "solver='paper' does not minimise objective='gram'"),
        ({"grid_iterations": -1}, "grid_iterations=-1 must be 0 or more"),
        ({"damping": -0.1}, "damping=-0.1 must be a finite number"),
        ({"iterations": -1}, "iterations=-1 must be 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"patience": 0}, "patience=0 must be at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(HalfplateError, match=message):
        create("armor", **options)


def test_block_that_no_group_fits_is_refused():
    with pytest.raises(HalfplateError, match=r"block_size=7 is not a multiple of M=4 \(pattern 2:4\); try 4 or 8"):
        spec_of(case()[0], 7, 7)


def test_too_wide_a_pattern_is_refused():
    weight, statistics = case()
    with pytest.raises(HalfplateError, match="keeps more than 16 of a group"):
        create("armor").compress(weight, statistics, spec_of(weight, 32, 32, pattern="20:32"))
