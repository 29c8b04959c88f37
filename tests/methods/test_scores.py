"""The masks and values of each baseline against loops over the elements, written from the papers."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.formats import Chain, WeightSpec
from halfplate.methods import create
from halfplate.methods.nowag import importance
from halfplate.methods.ria import relative_importance
from halfplate.pattern import Pattern
from halfplate.solvers.normalise import normalise
from halfplate.solvers.obs import obs_sweep
from halfplate.statistics import InputStatistics

Matrix = list[list[float]]


def magnitude_score(weight: Matrix, inputs: Matrix) -> Matrix:
    return [[abs(value) for value in row] for row in weight]


def input_norms(inputs: Matrix) -> list[float]:
    return [math.sqrt(sum(token[j] ** 2 for token in inputs)) for j in range(len(inputs[0]))]


def wanda_score(weight: Matrix, inputs: Matrix) -> Matrix:
    norms = input_norms(inputs)
    return [[abs(value) * norms[j] for j, value in enumerate(row)] for row in weight]


def ria_score(weight: Matrix, inputs: Matrix, power: float = 0.5) -> Matrix:
    norms = input_norms(inputs)
    columns = [sum(abs(row[j]) for row in weight) for j in range(len(weight[0]))]
    rows = [sum(abs(value) for value in row) for row in weight]
    return [
        [(abs(value) / columns[j] + abs(value) / rows[i]) * norms[j] ** power for j, value in enumerate(row)]
        for i, row in enumerate(weight)
    ]


def nowag_score(weight: Matrix, inputs: Matrix) -> Matrix:
    columns = [math.sqrt(sum(row[j] ** 2 for row in weight)) for j in range(len(weight[0]))]
    scaled = [[value / columns[j] for j, value in enumerate(row)] for row in weight]
    rows = [math.sqrt(sum(value**2 for value in row)) for row in scaled]
    norms = input_norms(inputs)
    return [[(value / rows[i]) ** 2 * norms[j] ** 2 for j, value in enumerate(row)] for i, row in enumerate(scaled)]


def naive_result(weight: Tensor, score: Matrix, pattern: Pattern) -> Tensor:
    result = torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], pattern.m):
            group = range(start, start + pattern.m)
            for j in sorted(group, key=lambda j: -score[i][j])[: pattern.n]:
                result[i, j] = weight[i, j]
    return result


def random_case(d_out: int, d_in: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(9, d_in, generator=generator) * torch.rand(d_in, generator=generator).add(0.05)
    return torch.randn(d_out, d_in, generator=generator), inputs


def compressed(name: str, weight: Tensor, inputs: Tensor, pattern: Pattern, **options: float) -> Chain:
    gram = inputs.T @ inputs / len(inputs)
    spec = WeightSpec(*weight.shape, pattern, "fp32")
    statistics = InputStatistics(len(inputs), gram.diagonal().clone(), gram)
    return create(name, **options).compress(weight, statistics, spec).weight


SCORES: dict[str, Callable[[Matrix, Matrix], Matrix]] = {
    "magnitude": magnitude_score,
    "wanda": wanda_score,
    "ria": ria_score,
    "nowag": nowag_score,
}


@pytest.mark.parametrize("name", SCORES)
@given(st.sampled_from(["2:4", "1:4", "4:8", "2:3"]), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_equals_loops(name: str, pattern: str, d_out: int, groups: int, seed: int) -> None:
    parsed = Pattern.parse(pattern)
    weight, inputs = random_case(d_out, groups * parsed.m, seed)
    score = SCORES[name](weight.double().tolist(), inputs.double().tolist())
    assert torch.equal(compressed(name, weight, inputs, parsed).dense(), naive_result(weight, score, parsed))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_power_of_ria(power: float) -> None:
    weight, inputs = random_case(6, 16, 0)
    score = ria_score(weight.double().tolist(), inputs.double().tolist(), power)
    found = compressed("ria", weight, inputs, Pattern(2, 4), power=power)
    assert torch.equal(found.dense(), naive_result(weight, score, Pattern(2, 4)))


def test_scores_themselves_equal_loops() -> None:
    weight, inputs = random_case(5, 8, 3)
    norms = torch.tensor(input_norms(inputs.double().tolist()))
    expected = torch.tensor(ria_score(weight.double().tolist(), inputs.double().tolist()))
    torch.testing.assert_close(relative_importance(weight) * norms.sqrt(), expected)
    expected = torch.tensor(nowag_score(weight.double().tolist(), inputs.double().tolist()))
    torch.testing.assert_close(importance(normalise(weight).weight, norms.square()).square(), expected)


def test_relative_importance_of_zero_rows_and_columns_is_zero() -> None:
    weight, _ = random_case(5, 8, 3)
    weight[2] = 0
    weight[:, 3] = 0
    score = relative_importance(weight)
    assert (score[2] == 0).all()
    assert (score[:, 3] == 0).all()
    assert score.isfinite().all()


def test_sparsegpt_stores_what_the_sweep_finds() -> None:
    weight, inputs = random_case(6, 16, 1)
    swept = obs_sweep(weight, inputs.T @ inputs / len(inputs), Pattern(2, 4), 0.05)
    values, mask = swept.weight, swept.mask
    core = compressed("sparsegpt", weight, inputs, Pattern(2, 4), damping=0.05).core
    assert torch.equal(core.dense(), values)
    assert torch.equal(core.mask(), mask)


def test_kept_values_round_to_the_nearest_of_their_type() -> None:
    weight, _ = random_case(6, 16, 1)
    spec = WeightSpec(6, 16, Pattern(2, 4), "bf16")
    core = create("magnitude").compress(weight, InputStatistics(), spec).weight.core
    assert torch.equal(core.dense()[core.mask()], weight[core.mask()].bfloat16().float())
