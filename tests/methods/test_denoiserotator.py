"""DenoiseRotator: rotations that are some, entropies that fall, and what that is worth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import BlockDiagonal, WeightSpec
from halfplate.methods import create
from halfplate.solvers.obs import damped_inverse
from halfplate.solvers.rotation import concentrating_rotations, entropy, rotated
from halfplate.statistics import InputStatistics


def problem(d_out: int, d_in: int, seed: int) -> tuple[Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * d_in, d_in, generator=generator) + torch.randn(
        4 * d_in, 4, generator=generator
    ) @ torch.randn(4, d_in, generator=generator)
    gram = (inputs.T @ inputs / len(inputs)).double()
    weight = torch.randn(d_out, 6, generator=generator) @ torch.randn(6, d_in, generator=generator)
    weight += 0.3 * torch.randn(d_out, d_in, generator=generator)
    return weight, InputStatistics(len(inputs), gram.diagonal().float(), gram)


def output_error(weight: Tensor, other: Tensor, statistics: InputStatistics) -> float:
    gap = (weight - other).double()
    return float(((gap @ statistics.require_gram()) * gap).sum())


def naive_entropy(scores: Tensor) -> float:
    values = scores.double().flatten().tolist()
    shares = [value / sum(values) for value in values]
    return -sum(share * math.log(share) for share in shares if share > 0)


def test_entropy_is_that_of_the_shares() -> None:
    scores = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).square()
    scores[2] = 0
    assert float(entropy(scores)) == pytest.approx(naive_entropy(scores), rel=1e-5)
    assert float(entropy(torch.ones(3, 4))) == pytest.approx(math.log(12), rel=1e-6)


@given(
    st.integers(1, 20),
    st.integers(2, 30),
    st.sampled_from([0, 1, 3, 8, 64]),
    st.sampled_from([0, 1, 4, 8, 64]),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_rotations_are_orthogonal_and_concentrate(
    d_out: int, d_in: int, out_block: int, in_block: int, seed: int
) -> None:
    weight, statistics = problem(d_out, d_in, seed)
    moment = statistics.require_gram()

    def importance(turned: Tensor, diagonal: Tensor) -> Tensor:
        return turned.square() * diagonal

    blocks = concentrating_rotations(weight, importance, moment, out_block, in_block, 5, 0.05)
    p, q = (
        BlockDiagonal.from_padded(part, size, part.shape[1], "fp32").dense(torch.float64)
        for part, size in zip(blocks, (d_out, d_in), strict=True)
    )
    for matrix in (p, q):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-5, rtol=0)
    turned = p @ weight.double() @ q.T
    torch.testing.assert_close(rotated(weight, *blocks).double(), turned, atol=1e-4, rtol=1e-4)
    after = naive_entropy(turned.square() * (q @ moment @ q.T).diagonal())
    before = naive_entropy(weight.square() * moment.diagonal())
    if max(out_block, in_block) > 1:
        assert after <= before + 1e-4
    else:
        assert torch.equal(p, torch.eye(d_out, dtype=torch.float64))
        assert torch.equal(q, torch.eye(d_in, dtype=torch.float64))


def test_the_inverse_is_the_damped_one() -> None:
    gram = problem(1, 12, 0)[1].require_gram()
    mean = gram.diagonal().mean()
    expected = torch.linalg.inv(gram / mean + 0.1 * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(damped_inverse(gram, 0.1), expected)


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
def test_without_steps_it_is_its_pruner_and_with_them_it_loses_less(pruner: str) -> None:
    ratios = []
    for seed in range(3):
        weight, statistics = problem(32, 48, seed)
        plain = create(pruner).compress(weight, statistics, WeightSpec(32, 48, core_dtype="fp32")).weight.dense()
        spec = WeightSpec(32, 48, core_dtype="fp32", out_block=16, in_block=16, wrapper_dtype="fp32")
        still, moved = (
            create("denoiserotator", pruner=pruner, steps=steps).compress(weight, statistics, spec).weight.dense()
            for steps in (0, 60)
        )
        torch.testing.assert_close(still, plain, atol=1e-4, rtol=1e-4)
        ratios.append(output_error(weight, moved, statistics) / output_error(weight, plain, statistics))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.9


def test_inputs_that_never_come_ask_for_nothing() -> None:
    weight, statistics = problem(16, 32, 0)
    gram = statistics.require_gram()
    gram[:4], gram[:, :4] = 0, 0
    other = weight.clone()
    other[:, :4] *= 100
    spec = WeightSpec(16, 32, out_block=8, in_block=8)
    first, second = (
        create("denoiserotator", steps=3).compress(one, InputStatistics(9, gram.diagonal().float(), gram), spec).weight
        for one in (weight, other)
    )
    assert torch.equal(first.dense(), second.dense())


def test_an_unknown_pruner_is_refused() -> None:
    with pytest.raises(HalfplateError, match=r"^pruner='magnitude' is not one of sparsegpt, wanda"):
        create("denoiserotator", pruner="magnitude")
