"""What every method must do, checked for all of them through the one interface.

A new method adds one row to METHODS_UNDER_TEST.
"""

import re
import sys
from dataclasses import FrozenInstanceError, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from halfplate.dtypes import WRAPPER_DTYPES
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.formats.quantizers import QUANTIZERS, core_dtypes
from halfplate.methods import METHODS, Method, Solution, create
from halfplate.pattern import DENSE, NONE, Pattern
from halfplate.statistics import InputStatistics, Statistic

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@dataclass(frozen=True)
class Row:
    """A method, its options, the block size of its wrappers (0: it has none), the type of its core and the columns of a scale."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    block: int = 0
    core_dtype: str = "bf16"
    group: int = 128

    def __str__(self) -> str:
        options = (f"{key}={value}" for key, value in self.options.items())
        return "-".join([self.name, *options, f"block={self.block}", self.core_dtype, f"group={self.group}"])


METHODS_UNDER_TEST = [
    Row("magnitude"),
    Row("wanda"),
    Row("ria"),
    Row("ria", {"power": 0.0}),
    Row("ria", {"permute": True}),
    Row("ria", {"permute": True}, core_dtype="int4", group=32),
    Row("nowag"),
    Row("sparsegpt"),
    Row("sparsegpt", {"damping": 0.0, "column_block": 8}),
    Row("armor", {"iterations": 3}, block=16),
    Row("armor", {"iterations": 3}, block=8),
    Row("armor", {"iterations": 3, "solver": "paper"}, block=16),
    Row("wanda", core_dtype="int8"),
    Row("sparsegpt", core_dtype="int4"),
    Row("armor", {"iterations": 3}, block=16, core_dtype="int4"),
    Row("rtn", core_dtype="int8"),
    Row("rtn", core_dtype="int4"),
    Row("slim", block=8),
    Row("slim", core_dtype="int8"),
    Row("gptq", core_dtype="int8"),
    Row("gptq", core_dtype="int3"),
    Row("gptq", core_dtype="int4", group=32),
    Row("rtn", core_dtype="int4", group=32),
    Row("sparsegpt", core_dtype="int4", group=32),
    Row("armor", {"iterations": 3}, block=8, core_dtype="int4", group=32),
    Row("denoiserotator", {"steps": 4}, block=8),
    Row("denoiserotator", {"steps": 4, "pruner": "wanda"}, block=16),
    Row("denoiserotator", {"steps": 4}, block=16, core_dtype="int4", group=32),
    Row("svd"),
    Row("svd", {"weighting": "none", "rank": 3}),
    Row("svd", {"weighting": "diagonal"}),
    Row("bitstack"),
    Row("bitstack", {"weighting": "diagonal", "rank": 2}),
    Row("rocket"),
    Row("rocket", {"weighting": "none", "iterations": 0}),
    Row("cospadi", {"iterations": 1}),
    Row("monarch"),
    Row("monarch", {"weighting": "none", "blocks": 2}),
    Row("gqsa", {"kept": 0.5, "width": 8}),
    Row("example"),  # the walk-through of CONTRIBUTING.md
]
every_row = pytest.mark.parametrize("row", METHODS_UNDER_TEST, ids=str)

# d_in is a multiple of every M below; blocks of 16 leave a smaller last block on either side.
D_OUT, D_IN = 24, 40
TWO_FOUR = Pattern(2, 4)
PATTERNS = [TWO_FOUR, Pattern(1, 4), Pattern(4, 8), Pattern(3, 5)]


@pytest.fixture(autouse=True)
def example_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the method that CONTRIBUTING.md walks through one of the registry for the time of a test."""
    text = CONTRIBUTING.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (line,) = re.findall(r'^"(\w+)": "([\w.:]+)",$', text, flags=re.MULTILINE)
    module = ModuleType(line[1].partition(":")[0])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(CONTRIBUTING), "exec"), module.__dict__)
    monkeypatch.setitem(METHODS.own, *line)


def spec_for(row: Row, pattern: Pattern = TWO_FOUR, core_dtype: str | None = None) -> WeightSpec:
    method = METHODS.get(row.name)
    if method.coreless:
        spec = WeightSpec(D_OUT, D_IN, NONE, core_dtype or row.core_dtype)
        return create(row.name, **row.options).sized(spec)
    if not method.sparse:
        pattern = DENSE
    block = -(-row.block // pattern.m) * pattern.m  # wrappers of inputs hold whole groups
    wrapper, rank = (0, block) if METHODS.get(row.name).low_rank else (block, 0)
    return WeightSpec(
        D_OUT,
        D_IN,
        pattern,
        core_dtype or row.core_dtype,
        wrapper,
        wrapper,
        rank=rank,
        permuted=create(row.name, **row.options).permutes,
        group=row.group,
    )


def random_weight(seed: int = 0) -> Tensor:
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: Tensor) -> InputStatistics:
    gram = inputs.T @ inputs / len(inputs)
    return InputStatistics(len(inputs), gram.diagonal().clone(), gram)


def random_statistics(seed: int = 0) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * D_IN, D_IN, generator=generator) * torch.rand(D_IN, generator=generator).add(0.1)
    return statistics_of(inputs + 0.3 * torch.randn(4 * D_IN, 1, generator=generator))


def compress(row: Row, weight: Tensor, statistics: InputStatistics, spec: WeightSpec) -> Solution:
    return create(row.name, **row.options).compress(weight, statistics, spec)


def check_solution(solution: Solution, spec: WeightSpec) -> None:
    """The tensors are those that the specification lays out, finite, with exactly N positions in each group."""
    tensors = solution.weight.tensors()
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == spec.layout()
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    groups = solution.weight.core.mask().reshape(spec.d_out, -1, spec.pattern.m)
    assert (groups.sum(-1) == spec.pattern.n).all()
    assert solution.weight.dense().isfinite().all()
    assert all(torch.tensor(solution.losses).isfinite())


def test_every_method_has_a_row() -> None:
    assert set(METHODS) == {row.name for row in METHODS_UNDER_TEST}


@every_row
def test_interface(row: Row) -> None:
    method = create(row.name, **row.options)
    assert isinstance(method, Method)
    assert method.name == row.name
    assert method.summary
    assert "\n" not in method.summary
    assert isinstance(method.requires, Statistic)
    assert (method.wrapped or method.low_rank) >= (row.block > 0)
    assert method.version >= 1
    assert type(method).__doc__
    assert is_dataclass(method)
    assert create(row.name, **row.options) == method
    with pytest.raises(FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


@every_row
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exactly_n_of_every_m(row: Row, pattern: Pattern) -> None:
    spec = spec_for(row, pattern)
    check_solution(compress(row, random_weight(), random_statistics(), spec), spec)


@every_row
@pytest.mark.parametrize("core_dtype", core_dtypes())
def test_every_stored_type(row: Row, core_dtype: str) -> None:
    spec = spec_for(row, core_dtype=core_dtype)
    if spec.pattern.is_none and core_dtype != "bf16":
        with pytest.raises(
            HalfplateError, match=f"core_dtype='{core_dtype}' is the type of a core, and method '{row.name}'"
        ):
            compress(row, random_weight(), random_statistics(), spec)
        return
    grid = "bf16" if spec.rank or spec.parts else "int8"  # low-rank parts have no grid
    spec = replace(spec, wrapper_dtype=core_dtype if core_dtype in WRAPPER_DTYPES and core_dtype != "int8" else grid)
    made = METHODS.get(row.name)
    if core_dtype not in QUANTIZERS and not (made.sparse or made.coreless):
        with pytest.raises(
            HalfplateError,
            match=rf"core_dtype='{core_dtype}' is not a quantised type.*; use {' or '.join(QUANTIZERS)}",
        ):
            compress(row, random_weight(), random_statistics(), spec)
        return
    check_solution(compress(row, random_weight(), random_statistics(), spec), spec)


@every_row
def test_equal_input_gives_equal_bits(row: Row) -> None:
    weight, statistics, spec = random_weight(), random_statistics(), spec_for(row)
    kept = weight.clone(), statistics.require_diagonal().clone(), statistics.require_gram().clone()
    first = compress(row, weight, statistics, spec)
    torch.rand(3)  # the global generator must not matter
    second = compress(row, weight, statistics, spec)
    assert first.losses == second.losses
    for name, tensor in first.weight.tensors().items():
        assert torch.equal(tensor, second.weight.tensors()[name]), name
    assert torch.equal(weight, kept[0])
    assert torch.equal(statistics.require_diagonal(), kept[1])
    assert torch.equal(statistics.require_gram(), kept[2])


@every_row
def test_needs_no_more_than_it_requires(row: Row) -> None:
    full, spec = random_statistics(), spec_for(row)
    requires = create(row.name, **row.options).requires
    least = InputStatistics(
        full.tokens,
        full.diagonal if requires >= Statistic.DIAGONAL else None,
        full.gram if requires >= Statistic.GRAM else None,
    )
    expected = compress(row, random_weight(), full, spec).weight.dense()
    assert torch.equal(compress(row, random_weight(), least, spec).weight.dense(), expected)
    if requires > Statistic.NONE:
        with pytest.raises(HalfplateError, match="calibrate"):
            compress(row, random_weight(), InputStatistics(), spec)


@every_row
def test_better_than_zero(row: Row) -> None:
    for seed in range(3):
        weight, statistics = random_weight(seed), random_statistics(seed)
        gap = weight - compress(row, weight, statistics, spec_for(row)).weight.dense()
        errors = [float(((matrix @ statistics.require_gram()) * matrix).sum()) for matrix in (gap, weight)]
        assert errors[0] < errors[1]


def zero_rows(weight: Tensor, inputs: Tensor) -> None:
    weight[[0, 7, D_OUT - 1]] = 0


def zero_columns(weight: Tensor, inputs: Tensor) -> None:
    weight[:, 4:8] = 0
    weight[:, D_IN - 1] = 0


def zero_weight(weight: Tensor, inputs: Tensor) -> None:
    weight.zero_()


def constant_rows(weight: Tensor, inputs: Tensor) -> None:
    weight.copy_(torch.linspace(-1, 1, D_OUT)[:, None].expand_as(weight))


def dead_inputs(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, 8:12] = 0
    inputs[:, 17] = 0


def dead_last_block(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, 32:] = 0


def all_dead(weight: Tensor, inputs: Tensor) -> None:
    inputs.zero_()


def dead_and_zero(weight: Tensor, inputs: Tensor) -> None:
    zero_rows(weight, inputs)
    weight[:16] = 0
    zero_columns(weight, inputs)
    dead_last_block(weight, inputs)


def one_token(weight: Tensor, inputs: Tensor) -> None:
    inputs[1:] = 0


def equal_inputs(weight: Tensor, inputs: Tensor) -> None:
    inputs.copy_(inputs[:, :1].expand_as(inputs).clone())


def massive_input(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, 5] *= 3e4


def huge_weight(weight: Tensor, inputs: Tensor) -> None:
    weight.mul_(1e12)


def small_weight(weight: Tensor, inputs: Tensor) -> None:
    weight.mul_(1e-12)


def unequal_rows(weight: Tensor, inputs: Tensor) -> None:
    weight.mul_(torch.logspace(-8, 8, D_OUT)[:, None])


def huge_inputs(weight: Tensor, inputs: Tensor) -> None:
    inputs.mul_(1e8)


def small_inputs(weight: Tensor, inputs: Tensor) -> None:
    inputs.mul_(1e-8)


HOSTILE = [
    zero_rows,
    zero_columns,
    zero_weight,
    constant_rows,
    dead_inputs,
    dead_last_block,
    all_dead,
    dead_and_zero,
    one_token,
    equal_inputs,
    massive_input,
    huge_weight,
    small_weight,
    unequal_rows,
    huge_inputs,
    small_inputs,
]


@every_row
@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_input_gives_finite_values(row: Row, damage: Any) -> None:
    weight, inputs = random_weight(), torch.randn(3 * D_IN, D_IN, generator=torch.Generator().manual_seed(1))
    damage(weight, inputs)
    spec = spec_for(row)
    if row.name == "gqsa" and damage in (huge_weight, unequal_rows):
        with pytest.raises(HalfplateError, match="need scales that fp16 cannot hold; use method svd"):
            compress(row, weight, statistics_of(inputs), spec)
        return
    if row.core_dtype in QUANTIZERS and damage in (huge_weight, unequal_rows):  # out of the range of fp16 scales
        with pytest.raises(HalfplateError, match=f"core_dtype='{row.core_dtype}' cannot hold .*; use bf16"):
            compress(row, weight, statistics_of(inputs), spec)
        return
    solution = compress(row, weight, statistics_of(inputs), spec)
    check_solution(solution, spec)
    if damage is zero_weight:
        assert (solution.weight.dense() == 0).all()


@every_row
def test_what_does_not_fit_is_refused(row: Row) -> None:
    weight, statistics, spec = random_weight(), random_statistics(), spec_for(row)
    with pytest.raises(HalfplateError, match=r"weight has shape \(24, 36\), expected \(24, 40\)"):
        compress(row, weight[:, :36], statistics, spec)
    requires = create(row.name, **row.options).requires
    if requires >= Statistic.DIAGONAL:
        with pytest.raises(HalfplateError, match=r"diagonal has shape \(36,\), expected \(40,\)"):
            compress(row, weight, replace(statistics, diagonal=torch.ones(36)), spec)
        with pytest.raises(HalfplateError, match=r"diagonal=-1 at its least"):
            compress(row, weight, replace(statistics, diagonal=-torch.ones(40)), spec)
    if requires >= Statistic.GRAM:
        with pytest.raises(HalfplateError, match=r"gram has shape \(36, 36\), expected \(40, 40\)"):
            compress(row, weight, replace(statistics, gram=torch.eye(36)), spec)
    if not row.block:
        with pytest.raises(
            HalfplateError, match=rf"block_size=8 needs wrappers, which method '{row.name}' does not make"
        ):
            compress(row, weight, statistics, replace(spec, in_block=8))
    if not spec.permuted:
        with pytest.raises(
            HalfplateError, match=rf"permuted=True is not supported by method '{row.name}' as configured"
        ):
            compress(row, weight, statistics, replace(spec, permuted=True))


@every_row
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(row: Row, value: float) -> None:
    weight, statistics, spec = random_weight(), random_statistics(), spec_for(row)
    damaged = weight.clone()
    damaged[3, 5] = value
    with pytest.raises(HalfplateError, match=rf"weight\[3, 5\] is {value}"):
        compress(row, damaged, statistics, spec)
    requires = create(row.name, **row.options).requires
    if requires >= Statistic.DIAGONAL:
        statistics.require_diagonal()[2] = value
        with pytest.raises(HalfplateError, match=rf"diagonal\[2\] is {value}"):
            compress(row, weight, statistics, spec)
    if requires >= Statistic.GRAM:
        damaged = torch.eye(D_IN)
        damaged[1, 2] = value
        with pytest.raises(HalfplateError, match=rf"gram\[1, 2\] is {value}"):
            compress(row, weight, replace(random_statistics(), gram=damaged), spec)


CORELESS = [row for row in METHODS_UNDER_TEST if row.name in METHODS.own and METHODS.get(row.name).coreless]
FLOATS_UNWRAPPED = [
    row for row in METHODS_UNDER_TEST if not row.block and row.core_dtype not in QUANTIZERS and row not in CORELESS
]


@every_row
def test_a_pattern_that_the_method_does_not_make_is_refused(row: Row) -> None:
    made = METHODS.get(row.name)
    for pattern, text, makes in ((DENSE, "dense", made.dense), (TWO_FOUR, "2:4", made.sparse)):
        if not makes:
            spec = replace(spec_for(row), pattern=pattern)
            with pytest.raises(HalfplateError, match=rf"^pattern='{text}' .* method '{row.name}'.*; use "):
                compress(row, random_weight(), random_statistics(), spec)


@pytest.mark.parametrize("row", FLOATS_UNWRAPPED, ids=str)
def test_overflow_of_the_stored_type_is_refused(row: Row) -> None:
    with pytest.raises(HalfplateError, match=r"core_dtype='fp16' cannot hold .* expected at most 6.55e\+04; use bf16"):
        compress(row, 1e6 * random_weight(), random_statistics(), spec_for(row, core_dtype="fp16"))


@pytest.mark.parametrize("row", [row for row in CORELESS if row.name != "gqsa"], ids=str)
def test_overflow_of_a_stored_part_is_refused(row: Row) -> None:
    spec = replace(spec_for(row), wrapper_dtype="fp16")
    with pytest.raises(HalfplateError, match=r"wrapper_dtype='fp16' cannot hold .*; use bf16"):
        compress(row, 1e12 * random_weight(), random_statistics(), spec)


@every_row
def test_unknown_option_is_refused(row: Row) -> None:
    known = [option.name for option in fields(METHODS.get(row.name))]
    with pytest.raises(HalfplateError, match=f"temperature=1 is not an option of method {row.name!r}") as caught:
        create(row.name, temperature=1)
    assert ", ".join(known) in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "meant"), [("magnitud", "magnitude"), ("wnda", "wanda"), ("sparse-gpt", "sparsegpt"), ("armour", "armor")]
)
def test_unknown_name_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(HalfplateError, match=f"method='{typed}' is unknown; did you mean '{meant}'"):
        create(typed)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ria", {"power": -1.0}),
        ("ria", {"power": float("nan")}),
        ("sparsegpt", {"damping": -0.1}),
        ("sparsegpt", {"damping": float("inf")}),
        ("sparsegpt", {"column_block": 0}),
        ("denoiserotator", {"steps": -1}),
        ("svd", {"rank": 0}),
        ("svd", {"share": 0.0}),
        ("svd", {"share": 1.0}),
        ("svd", {"weighting": "fisher"}),
        ("svd", {"damping": -1.0}),
        ("bitstack", {"rank": 0}),
        ("rocket", {"ratio": 0.5}),
        ("rocket", {"iterations": -1}),
        ("cospadi", {"iterations": 0}),
        ("monarch", {"blocks": 1}),
        ("gqsa", {"width": 1}),
        ("gqsa", {"kept": 0.0}),
        ("denoiserotator", {"learning_rate": 0.0}),
        ("denoiserotator", {"damping": -0.1}),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(HalfplateError, match=f"^{option}=.* must be .*; try "):
        create(name, **options)


@pytest.mark.parametrize(("power", "equal"), [(0.0, "magnitude"), (1.0, "wanda")])
def test_example_of_contributing_is_what_it_says(power: float, equal: str) -> None:
    weight, statistics, spec = random_weight(), random_statistics(), spec_for(Row("example"))
    found = create("example", power=power).compress(weight, statistics, spec)
    expected = create(equal).compress(weight, statistics, spec)
    assert torch.equal(found.weight.dense(), expected.weight.dense())


def test_contributing_names_what_there_is() -> None:
    text = CONTRIBUTING.read_text()
    for path in re.findall(r"`((?:src|tests)/[\w/.]+)`", text):
        assert (CONTRIBUTING.parent / path).exists() or path.endswith("/example.py"), path
    (row,) = re.findall(r"^(Row\(.*\)),$", text, flags=re.MULTILINE)
    assert eval(row).name == "example"
