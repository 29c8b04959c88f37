"""The levels among which a budget chooses."""

from dataclasses import replace

from halfplate import methods
from halfplate.allocation import candidates, table_candidates, uneven
from halfplate.formats import WeightSpec
from halfplate.pattern import Pattern

SPEC = WeightSpec(64, 128, out_block=16, in_block=16)
ARMOR = methods.create("armor")


def test_nothing_free_leaves_the_matrix_as_it_is():
    assert candidates(SPEC, ARMOR, ()) == [SPEC]


def test_free_blocks_and_patterns():
    found = candidates(SPEC, ARMOR, ("block_size", "pattern"))
    assert {(str(spec.pattern), spec.in_block) for spec in found} >= {("1:4", 0), ("2:4", 8), ("2:4", 16), ("3:4", 0)}
    assert all(spec.core_dtype == "bf16" and not spec.pattern.is_dense for spec in found)
    assert [spec.nbytes for spec in found] == sorted(spec.nbytes for spec in found)
    assert all(spec.nbytes < spec.dense_nbytes for spec in found)
    assert len(set(found)) == len(found)


def test_a_grid_may_keep_every_value():
    found = candidates(SPEC, ARMOR, ("pattern", "core_dtype"))
    assert any(spec.pattern.is_dense and spec.core_dtype == "nl3" for spec in found)
    assert not any(spec.pattern.is_dense and spec.core_dtype == "bf16" for spec in found)


def test_what_the_method_cannot_make_is_left_out():
    assert {spec.in_block for spec in candidates(WeightSpec(64, 128), methods.create("wanda"), ("block_size",))} == {0}
    odd = WeightSpec(64, 6, Pattern(1, 2))
    assert {str(spec.pattern) for spec in candidates(odd, methods.create("wanda"), ("pattern",))} == {"1:2"}


def test_uneven_blocks_change_one_side():
    found = uneven(replace(SPEC, d_out=256, d_in=512), ARMOR, ("block_size",))
    assert {(spec.out_block, spec.in_block) for spec in found} == {
        (0, 16),
        (8, 16),
        (32, 16),
        (16, 0),
        (16, 8),
        (16, 32),
    }
    assert [spec.nbytes for spec in found] == sorted(spec.nbytes for spec in found)
    assert uneven(SPEC, ARMOR, ("pattern",)) == []
    assert uneven(WeightSpec(64, 128), methods.create("wanda"), ("block_size",)) == []


def test_four_of_eight_where_groups_of_eight_fit():
    assert "4:8" in {str(spec.pattern) for spec in candidates(SPEC, ARMOR, ("pattern",))}
    assert "4:8" not in {str(spec.pattern) for spec in candidates(WeightSpec(64, 12), ARMOR, ("pattern",))}


def test_a_field_may_be_limited_to_some_values():
    dense = replace(SPEC, pattern=Pattern.parse("dense"), core_dtype="nl4", out_block=0, in_block=0)
    found = candidates(dense, ARMOR, ["core_dtype=nl4+nl5"])
    assert [spec.core_dtype for spec in found] == ["nl4", "nl5"]
    named = candidates(
        dense, ARMOR, ["core_dtype=nl4k+int6", "group_size=32+64"]
    )  # the first is none that is offered by itself
    assert {(spec.core_dtype, spec.group) for spec in named} >= {("nl4k", 32), ("nl4k", 64), ("int6", 32), ("int6", 64)}
    blocks = candidates(SPEC, ARMOR, ["block_size=0+8"])
    assert {spec.in_block for spec in blocks} <= {0, 8, SPEC.in_block}


def test_every_value_of_an_embedding_is_offered_whatever_the_matrices_may_be():
    table = replace(SPEC, pattern=Pattern.parse("dense"), core_dtype="int8", out_block=0, in_block=0)
    assert "int8" in {spec.core_dtype for spec in table_candidates(table, ["core_dtype=nl4+nl5"])}
