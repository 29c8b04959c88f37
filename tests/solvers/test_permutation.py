"""Channel permutation against every possible assignment, and what it promises."""

from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern
from halfplate.solvers import permutation
from halfplate.solvers.permutation import channel_permutation, check_available, dealt, retained

PATTERNS = st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(3, 5)])


def scores(d_out: int, d_in: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(d_out, d_in, generator=generator) * torch.rand(d_in, generator=generator).pow(4)


def naive_retained(score: Tensor, order: list[int], pattern: Pattern) -> float:
    total = 0.0
    for row in score.double().tolist():
        for start in range(0, len(order), pattern.m):
            group = [row[column] for column in order[start : start + pattern.m]]
            total += max(sum(kept) for kept in combinations(group, pattern.n))
    return total


def best_retained(score: Tensor, order: list[int], place: int, pattern: Pattern) -> float:
    """The most that is retained if the columns at `place` are given to the groups anew, with every assignment tried."""
    places = range(place, len(order), pattern.m)
    tried = []
    for moved in permutations([order[at] for at in places]):
        other = list(order)
        for at, column in zip(places, moved, strict=True):
            other[at] = column
        tried.append(naive_retained(score, other, pattern))
    return max(tried)


@given(PATTERNS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_each_assignment_is_the_best_there_is(pattern: Pattern, d_out: int, groups: int, seed: int) -> None:
    score = scores(d_out, groups * pattern.m, seed)
    order = dealt(score, pattern.m)
    for place in range(pattern.m):
        # Of assignments that retain the same, one may lead further later: so each step begins where the last one really ended.
        best = best_retained(score, order.reshape(-1).tolist(), place, pattern)
        order[:, place] = permutation._assigned(score, order, place, pattern)
        assert naive_retained(score, order.reshape(-1).tolist(), pattern) == pytest.approx(best, rel=1e-6)
    found = channel_permutation(score, pattern)
    assert found.tolist() == order.reshape(-1).tolist()
    assert sorted(found.tolist()) == list(range(score.shape[1]))
    assert retained(score, found, pattern) == pytest.approx(naive_retained(score, found.tolist(), pattern), rel=1e-6)


@given(PATTERNS, st.integers(1, 20), st.integers(1, 30), st.integers(0, 1000), st.sampled_from([1, 100, 1 << 24]))
@settings(max_examples=40, deadline=None)
def test_assignments_never_lose_what_dealing_won(
    pattern: Pattern, d_out: int, groups: int, seed: int, chunk: int
) -> None:
    score = scores(d_out, groups * pattern.m, seed)
    before, permutation.CHUNK = permutation.CHUNK, chunk
    try:
        order = channel_permutation(score, pattern)
    finally:
        permutation.CHUNK = before
    assert sorted(order.tolist()) == list(range(score.shape[1]))
    first = dealt(score, pattern.m).reshape(-1)
    assert retained(score, order, pattern) >= retained(score, first, pattern) * (1 - 1e-6)


def test_columns_are_dealt_out_in_snake_order() -> None:
    score = torch.arange(12.0).flip(0)[None]  # column k has rank k
    assert dealt(score, 4).tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]


def test_crowded_channels_are_spread() -> None:
    score = torch.tensor([[9.0, 9, 9, 9, 1, 1, 1, 1]]).expand(3, -1)
    natural = torch.arange(8)
    order = channel_permutation(score, Pattern(2, 4))
    assert retained(score, order, Pattern(2, 4)) == 3 * 36
    assert retained(score, natural, Pattern(2, 4)) == 3 * 20


def test_without_scipy_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_available()
    monkeypatch.setattr(permutation, "find_spec", lambda name: None)
    with pytest.raises(HalfplateError, match=r"^permute=True needs scipy, .*halfplate\[permutation\]"):
        check_available()
