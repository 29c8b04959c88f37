"""Solvers of matrices without a core, against simple references."""

import pytest
import torch
from torch import Tensor

from halfplate.allocation.ranks import normalised, ranks_within
from halfplate.formats import WeightSpec
from halfplate.formats.quantizers.uniform import INT4
from halfplate.methods import create
from halfplate.methods.svd import weighted_svd
from halfplate.pattern import DENSE, NONE
from halfplate.solvers.dictionary import coefficients_on, largest_support, principal, pursued, updated_by_atom
from halfplate.solvers.group_sweep import group_sweep
from halfplate.solvers.signs import nearest_signs, refitted_left
from halfplate.solvers.whitening import Whitening
from halfplate.statistics import InputStatistics

D_OUT, D_IN = 20, 32


def data(d_out: int = D_OUT, d_in: int = D_IN) -> tuple[Tensor, InputStatistics]:
    """A weight whose singular values fall, and inputs that correlate."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d_in, d_in, generator=generator) * torch.logspace(0, -1.5, d_in)
    inputs = torch.randn(400, d_in, generator=generator) @ mix + 0.05 * torch.randn(400, d_in, generator=generator)
    u, _, vh = torch.linalg.svd(torch.randn(d_out, d_in, generator=generator), full_matrices=False)
    gram = (inputs.T @ inputs / 400).double()
    return u * torch.logspace(0, -2, len(vh)) @ vh, InputStatistics(400, gram.diagonal().float(), gram)


def error(weight: Tensor, found: Tensor, statistics: InputStatistics) -> float:
    gap, gram = (weight - found).double(), statistics.require_gram()
    whole = float(((weight.double() @ gram) * weight).sum())
    return float(((gap @ gram) * gap).sum()) / whole


def compressed(name: str, weight: Tensor, statistics: InputStatistics, **options: object) -> tuple[Tensor, int]:
    method = create(name, **options)
    spec = method.sized(WeightSpec(*weight.shape, NONE, wrapper_dtype="fp32" if name == "svd" else "bf16"))
    chain = method.compress(weight, statistics, spec).weight
    return chain.dense(), spec.nbytes


def test_whitening_turns_output_errors_into_plain_ones() -> None:
    weight, statistics = data()
    whitening = Whitening.of("gram", statistics, weight, 0.0)
    gram = statistics.require_gram()
    expected = ((weight.double() @ gram) * weight).sum() / gram.diagonal().mean()
    assert torch.allclose(whitening.into(weight).square().sum(), expected)
    assert torch.allclose(whitening.back(whitening.into(weight)), weight.double(), atol=1e-8)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_weighted_svd_reaches_the_smallest_error(rank: int) -> None:
    weight, statistics = data()
    whitening = Whitening.of("gram", statistics, weight, 0.0)
    left, right = weighted_svd(weight, whitening, rank)
    values = torch.linalg.svdvals(whitening.into(weight))
    least = float(values[rank:].square().sum() / values.square().sum())
    assert error(weight, left @ right, statistics) == pytest.approx(least, rel=1e-5)


def test_better_weights_give_smaller_output_errors() -> None:
    weight, statistics = data()
    plain, diagonal, gram = (
        error(weight, compressed("svd", weight, statistics, rank=5, weighting=how)[0], statistics)
        for how in ("none", "diagonal", "gram")
    )
    assert gram < diagonal < plain


@pytest.mark.parametrize("name", ["rocket", "cospadi"])
def test_dictionaries_beat_low_rank_at_equal_bytes(name: str) -> None:
    # Of real layers, whose singular values fall slowly; low rank is better where they fall steeply.
    (_, statistics), weight = data(96, 64), torch.randn(96, 64, generator=torch.Generator().manual_seed(5))
    for share in (0.5, 0.7):
        low_rank = create("svd", share=share)
        spec = low_rank.sized(WeightSpec(96, 64, NONE))
        svd = low_rank.compress(weight, statistics, spec).weight.dense()
        found, nbytes = compressed(name, weight, statistics, share=share)
        assert nbytes <= share * 2 * 96 * 64
        assert error(weight, found, statistics) < error(weight, svd, statistics)


def test_largest_support_prefers_the_first_of_equal_scores() -> None:
    assert largest_support(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[False, True, True, False]]


def test_matching_pursuit_against_least_squares_at_every_step() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, atoms = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (9, 15))
    unit = atoms / atoms.norm(dim=1, keepdim=True)
    support = pursued(rows, atoms, 4)
    for row, found in zip(rows, support, strict=True):
        chosen: list[int] = []
        left = row
        for _ in range(4):
            scores = (unit @ left).abs()
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            part = unit[chosen].T
            left = row - part @ torch.linalg.lstsq(part, row).solution
        assert sorted(chosen) == found.nonzero()[:, 0].tolist()


def test_coefficients_are_least_squares_and_passes_never_lose() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(30, 16, generator=generator, dtype=torch.float64)
    atoms = principal(rows, 10)
    support = pursued(rows, atoms, 4)
    coefficients = coefficients_on(rows, atoms, support)
    for row, found, chosen in zip(rows, coefficients, support, strict=True):
        expected = torch.linalg.lstsq(atoms[chosen].T, row).solution
        assert torch.allclose(found[chosen], expected, atol=1e-5)
    before = float((rows - coefficients @ atoms).square().sum())
    atoms, coefficients = updated_by_atom(rows, atoms, coefficients)
    assert float((rows - coefficients @ atoms).square().sum()) < before
    assert ((coefficients != 0) <= support).all()


def test_signs_are_the_nearest_ones_in_order() -> None:
    weight, statistics = data()
    whitening = Whitening.of("gram", statistics, weight, 0.01)
    magnitudes = weight.double().abs().mean().expand(weight.shape)
    found = nearest_signs(weight.double(), magnitudes, whitening)
    assert whitening.factor is not None
    lower = whitening.scales[:, None] * whitening.factor
    for row in range(3):
        errors = torch.zeros(D_IN, dtype=torch.float64)
        for column in reversed(range(D_IN)):
            ahead = errors[column + 1 :] @ lower[column + 1 :, column]
            gaps = [
                abs(float((weight[row, column] - sign * magnitudes[row, column]) * lower[column, column] + ahead))
                for sign in (1, -1)
            ]
            assert bool(found[row, column]) == (gaps[1] < gaps[0])
            errors[column] = weight[row, column] - (-1 if found[row, column] else 1) * magnitudes[row, column]
    by_entry = torch.where(weight < 0, -1.0, 1.0) * magnitudes
    swept = torch.where(found, -1.0, 1.0) * magnitudes
    assert error(weight, swept, statistics) < error(weight, by_entry, statistics)


def test_refitted_left_is_least_squares() -> None:
    weight, statistics = data()
    whitening, right = Whitening.of("gram", statistics, weight, 0.01), torch.rand(3, D_IN, dtype=torch.float64)
    negative = weight < 0
    left = refitted_left(weight.double(), negative, right, whitening)
    signs = 1 - 2 * negative.double()
    for row in range(D_OUT):
        features = whitening.into(signs[row] * right)
        expected = torch.linalg.lstsq(features.T, whitening.into(weight[row : row + 1])[0]).solution
        assert torch.allclose(left[row], expected, rtol=1e-3, atol=1e-5)


def test_group_sweep_keeps_the_chosen_and_beats_rounding() -> None:
    weight, statistics = data()
    whitening = Whitening.of("gram", statistics, weight, 0.01)
    chosen = torch.rand(D_OUT, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    integers, scales = group_sweep(weight.double(), chosen, 8, INT4, whitening)
    kept = chosen[:, :, None].expand(-1, -1, 8).flatten(1)
    assert (integers[~kept] == 0).all()
    swept = integers * scales.float().repeat_interleave(8, 1)
    rounded = (
        create("rtn").compress(weight, statistics, WeightSpec(D_OUT, D_IN, DENSE, "int4", group=32)).weight.dense()
    )
    assert error(weight, swept, statistics) < error(weight, rounded * kept, statistics)


def test_ranks_by_one_threshold() -> None:
    spectra = [normalised(torch.tensor([4.0, 3, 2, 1])), normalised(torch.tensor([4.0, 1, 1, 1]))]
    assert spectra[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    ranks, threshold = ranks_within(spectra, [lambda rank: 10 * rank] * 2, 30)
    assert ranks == [2, 1]
    assert 1 / 3 <= threshold < 2 / 3
    assert ranks_within(spectra, [lambda rank: 10 * rank] * 2, 1)[0] == [1, 1]
    assert normalised(torch.ones(3)).tolist() == [1, 1, 1]
