import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.dtypes import WRAPPER_DTYPES
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.formats.quantizers import core_dtypes
from halfplate.pattern import DENSE, Pattern

GOOD = WeightSpec(10, 12, out_block=4, in_block=8).to_json()


@given(
    st.sampled_from([(2, 4), (1, 8), (2, 5), (1, 1)]),
    st.integers(1, 5000),
    st.integers(1, 500),
    st.integers(0, 300),
    st.integers(0, 40),
    st.sampled_from(core_dtypes()),
    st.sampled_from(WRAPPER_DTYPES),
    st.booleans(),
    st.sampled_from([32, 64, 128]),
)
@settings(max_examples=60, deadline=None)
def test_json_round_trip(
    nm: tuple[int, int],
    d_out: int,
    groups: int,
    out_block: int,
    in_groups: int,
    core: str,
    wrapper: str,
    permuted: bool,
    group: int,
) -> None:
    d_in = groups * nm[1]
    spec = WeightSpec(
        d_out, d_in, Pattern(*nm), core, out_block, in_groups * nm[1], wrapper, permuted=permuted, group=group
    )
    assert WeightSpec.from_json(json.loads(json.dumps(spec.to_json())), "m") == spec
    assert spec.nbytes == sum(
        torch.empty(shape, dtype=dtype, device="meta").nbytes for shape, dtype in spec.layout().values()
    )
    assert spec.layout()["weight"][0] != (spec.d_out, spec.d_in)


def test_the_entry_of_the_contract() -> None:
    assert GOOD == {
        "format": "chain",
        "shape": [10, 12],
        "pattern": "2:4",
        "core_dtype": "bf16",
        "out_block": 4,
        "in_block": 8,
        "wrapper_dtype": "bf16",
    }
    assert WeightSpec(10, 12).to_json()["format"] == "nm"
    more = WeightSpec(10, 12, permuted=True, group=64).to_json()
    assert more == WeightSpec(10, 12).to_json() | {"permuted": True, "group": 64}


def test_the_layout_of_the_contract() -> None:
    assert WeightSpec(10, 172, out_block=64, in_block=16).layout() == {
        "weight": ((10, 86), torch.bfloat16),
        "weight_index": ((10, 22), torch.uint8),
        "weight_out_tail": ((10, 10), torch.bfloat16),
        "weight_in_blocks": ((10, 16, 16), torch.bfloat16),
        "weight_in_tail": ((12, 12), torch.bfloat16),
    }


def test_the_layout_of_codes() -> None:
    assert WeightSpec(10, 172, core_dtype="int4", out_block=4, wrapper_dtype="int8").layout() == {
        "weight": ((10, 43), torch.uint8),
        "weight_index": ((10, 22), torch.uint8),
        "weight_scales": ((10, 2), torch.float16),
        "weight_out_blocks": ((2, 4, 4), torch.int8),
        "weight_out_tail": ((2, 2), torch.int8),
        "weight_out_scales": ((10,), torch.float16),
    }
    assert WeightSpec(10, 128, core_dtype="int8").layout()["weight"] == ((10, 64), torch.uint8)
    assert WeightSpec(10, 129, DENSE, "int8").layout() == {
        "weight": ((1, 10, 129), torch.uint8),
        "weight_scales": ((10, 2), torch.float16),
    }
    assert WeightSpec(10, 172, core_dtype="int4", group=64).layout()["weight_scales"] == ((10, 3), torch.float16)
    assert WeightSpec(10, 1, DENSE, "int4").layout()["weight"] == ((1, 10, 1), torch.uint8)
    assert WeightSpec(10, 7, DENSE).layout() == {"weight": ((1, 10, 7), torch.bfloat16)}


@pytest.mark.parametrize(("d_in", "dtype"), [(32768, torch.int16), (32772, torch.int32)])
def test_the_layout_of_an_order_of_inputs(d_in: int, dtype: torch.dtype) -> None:
    plain, permuted = WeightSpec(10, d_in), WeightSpec(10, d_in, permuted=True)
    assert permuted.layout() == plain.layout() | {"weight_permutation": ((d_in,), dtype)}
    assert permuted.nbytes == plain.nbytes + d_in * dtype.itemsize


def test_the_format_of_dense_cores() -> None:
    assert WeightSpec(10, 7, DENSE).format == "dense"
    assert WeightSpec(10, 7, DENSE, in_block=3).format == "chain"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"in_block": 6}, "block_size=6 is not a multiple of M=4 (pattern 2:4); try 4 or 8"),
        ({"in_block": 2}, "try 4"),
        ({"out_block": -1}, "out_block=-1"),
        ({"d_out": 0}, "d_out=0"),
        ({"d_in": 0}, "d_in=0"),
        ({"d_in": -4}, "d_in=-4"),
        ({"d_in": 10}, "d_in=10 is not a multiple of M=4"),
        ({"group": 48}, "group_size=48 is not one of 16, 32, 64, 128"),
        (
            {"group": 16},
            "group_size=16 is for unpruned cores, and the pattern is 2:4; use group_size 32 or pattern dense",
        ),
        ({"core_dtype": "fp8"}, "core_dtype='fp8'"),
        ({"wrapper_dtype": "int4"}, "wrapper_dtype='int4' is not one of fp32, bf16, fp16, int8"),
    ],
)
def test_specs_that_cannot_work_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HalfplateError) as raised:
        WeightSpec(**({"d_out": 8, "d_in": 8} | change))
    assert complaint in str(raised.value)


HOSTILE = [
    None,
    7,
    "chain",
    [],
    {},
    [["format", "nm"]],
    GOOD | {"shape": [10]},
    GOOD | {"shape": [10, 12, 3]},
    GOOD | {"shape": "ab"},
    GOOD | {"shape": [10.0, 12]},
    GOOD | {"shape": [True, 12]},
    GOOD | {"shape": [-10, 12]},
    GOOD | {"shape": [10, -12]},
    GOOD | {"pattern": 24},
    GOOD | {"pattern": "4:2"},
    GOOD | {"pattern": "2:4\n"},
    GOOD | {"core_dtype": ["bf16"]},
    GOOD | {"core_dtype": None},
    GOOD | {"out_block": "4"},
    GOOD | {"out_block": 4.5},
    GOOD | {"in_block": True},
    GOOD | {"format": "nm"},
    GOOD | {"format": None},
    GOOD | {"extra": 1},
    GOOD | {"permuted": 1},
    GOOD | {"permuted": None},
    GOOD | {"group": True},
    GOOD | {"group": 64.0},
    GOOD | {"group": 0},
    GOOD | {"group": "64"},
    {key: value for key, value in GOOD.items() if key != "core_dtype"},
    {key: value for key, value in GOOD.items() if key != "in_block"},
]


@pytest.mark.parametrize("entry", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_entries_are_refused_by_name(entry: Any) -> None:
    with pytest.raises(HalfplateError, match=r"quantization_config\.modules\['layers\.0\.up'\]") as raised:
        WeightSpec.from_json(entry, "layers.0.up")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_other_json_is_refused(entry: Any) -> None:
    with pytest.raises(HalfplateError):
        WeightSpec.from_json(entry, "m")


@given(
    st.sampled_from(sorted(GOOD)),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
)
@settings(max_examples=100, deadline=None)
def test_any_other_value_gives_a_spec_or_a_halfplate_error(key: str, value: Any) -> None:
    try:
        spec = WeightSpec.from_json(GOOD | {key: value}, "m")
    except HalfplateError:
        return
    assert WeightSpec.from_json(spec.to_json(), "m") == spec
    assert spec.nbytes > 0
