import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfplate.dtypes import stored_dtype
from halfplate.errors import HalfplateError
from halfplate.pattern import DENSE, Pattern


@given(st.integers(2, 256).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))))
def test_patterns_survive_their_text(nm: tuple[int, int]) -> None:
    pattern = Pattern(*nm)
    assert Pattern.parse(str(pattern)) == pattern
    assert 2**pattern.index_bits >= pattern.m > 2 ** (pattern.index_bits - 1)


@pytest.mark.parametrize(
    "text", ["", "2", "2:4:8", "2:4 ", "4:4", "1:1", "Dense", "5:4", "0:4", "2:257", "-2:4", "1000:2000", "a:b", "2/4"]
)
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(HalfplateError, match="pattern="):
        Pattern.parse(text)


def test_dense_keeps_all_without_an_index() -> None:
    assert Pattern.parse("dense") == Pattern.parse(str(DENSE)) == DENSE
    assert (DENSE.kept(7), DENSE.index_nbytes(7)) == (7, 0)


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    assert Pattern(2, 4).kept(8) == 4
    with pytest.raises(HalfplateError, match="d_in=10 is not a multiple of M=4"):
        Pattern(2, 4).kept(10)


def test_an_unknown_element_type_is_refused() -> None:
    with pytest.raises(HalfplateError, match="core_dtype='fp8' is not one of fp32, bf16, fp16"):
        stored_dtype("fp8", "core_dtype")
