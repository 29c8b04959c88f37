"""keep_largest against a plain sort of every group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.errors import HalfplateError
from halfplate.pattern import Pattern
from halfplate.solvers.selection import keep_largest


def naive_keep_largest(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], pattern.m):
            group = range(start, start + pattern.m)
            for column in sorted(group, key=lambda j: (-score[row, j].item(), j))[: pattern.n]:
                mask[row, column] = True
    return mask


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    m = draw(st.integers(2, 9))
    return Pattern(draw(st.integers(1, m - 1)), m)


@given(patterns(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16), st.booleans())
@settings(max_examples=40, deadline=None)
def test_equals_a_sort_of_every_group(pattern: Pattern, d_out: int, groups: int, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(d_out, groups * pattern.m, generator=generator)
    if ties:
        score = (score * 3).round()
    mask = keep_largest(score, pattern)
    assert torch.equal(mask, naive_keep_largest(score, pattern))
    assert (mask.reshape(d_out, groups, pattern.m).sum(-1) == pattern.n).all()


def test_ties_go_to_the_first_positions() -> None:
    score = torch.zeros(300, 64)
    expected = torch.tensor([True, True, False, False]).repeat(300, 16)
    assert torch.equal(keep_largest(score, Pattern(2, 4)), expected)
    assert torch.equal(keep_largest(torch.full_like(score, torch.inf), Pattern(2, 4)), expected)


def test_zeros_of_either_sign_are_equal() -> None:
    assert keep_largest(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), Pattern(2, 4)).tolist() == [[True, True, False, False]]


def test_transposed_scores_are_read_right() -> None:
    score = torch.rand(12, 5, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(keep_largest(score, Pattern(2, 4)), naive_keep_largest(score, Pattern(2, 4)))


def test_nan_is_refused_with_its_place() -> None:
    score = torch.zeros(3, 8)
    score[1, 6] = torch.nan
    with pytest.raises(HalfplateError, match=r"score\[1, 6\] is NaN"):
        keep_largest(score, Pattern(2, 4))


def test_a_length_that_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(HalfplateError, match="d_in=10 is not a multiple of M=4"):
        keep_largest(torch.zeros(3, 10), Pattern(2, 4))
