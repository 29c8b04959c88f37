"""The rows of the quality tables, in the order in which they are measured: a label and how the model is made.

Whatever a row does not say is the default of `Recipe` or `Recovery`, on 64 samples of 512 tokens. Texts are named: `text` is
the model's own field (WikiText-2 train, or TinyStories), beside `c4` and `self`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from halfplate.formats import WeightSpec
from halfplate.recipe import Recipe


@dataclass(frozen=True)
class Dense:
    """The model as it is."""


@dataclass(frozen=True)
class LlamaCpp:
    """A GGUF file of the type `kind`, made and run by llama.cpp."""

    kind: str


@dataclass(frozen=True)
class Compressed:
    """The main job. recipe: fields of `Recipe`, with the calibration text by its name."""

    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Recovered:
    """`recover` after another row. settings: fields of `Recovery`, with the text by its name."""

    parent: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Rounded:
    """The core of another row rounded to nearest on the grid of `core_dtype`, its wrappers as they are."""

    parent: str
    core_dtype: str


@dataclass(frozen=True)
class Run:
    """The checkpoint of another row with int8 activations."""

    parent: str


Making = Dense | LlamaCpp | Compressed | Recovered | Rounded | Run


@dataclass(frozen=True)
class Row:
    """One row. tags: what it belongs to. ablations: its setting in each table of ablations that it stands in.

    group: where it stands in the main table; rows of ablations alone have none.
    """

    label: str
    making: Making
    tags: tuple[str, ...] = ("main",)
    ablations: Mapping[str, str] = field(default_factory=dict)
    group: str = ""

    @property
    def parent(self) -> str | None:
        """The label of the row whose checkpoint this one starts from."""
        return getattr(self.making, "parent", None)


def rows(block: int, recovery_minutes: float) -> list[Row]:
    """All rows of a model, parents before their children. block: of the wrappers, and the rank that is as many bytes."""
    return [
        *_in_group("dense, and what llama.cpp makes of it", _dense_and_peers()),
        *_in_group("2:4, bf16 cores", _two_of_four(block)),
        *_in_group("recovered", _recovered(recovery_minutes)),
        *_in_group("2:4 cores on a grid", _sparse_grids(block)),
        *_in_group("dense on a grid", _dense_grids(block)),
        *_in_group("the level of each matrix chosen under a budget", _budgets(block)),
        *_ablations(block),
    ]


def _in_group(group: str, found: list[Row]) -> list[Row]:
    return [replace(row, group=group) for row in found]


def select(table: list[Row], tags: list[str], patterns: list[str]) -> list[Row]:
    """The rows that have one of `tags` (none: all) and whose label fits one of the shell `patterns` (none: all)."""
    return [
        row
        for row in table
        if (not tags or set(tags) & set(row.tags))
        and (not patterns or any(fnmatchcase(row.label, pattern) for pattern in patterns))
    ]


def described(row: Row, table: Mapping[str, Row]) -> dict[str, Any]:
    """Everything that makes the row what it is, as JSON: its recipe with all defaults, and that of its parents.

    A recipe that this Halfplate refuses stands as it is written.
    """
    making: dict[str, Any] = {"kind": type(row.making).__name__} | asdict(row.making)
    if isinstance(row.making, Compressed):
        making["stated"] = dict(row.making.recipe)
        making["recipe"] = _complete(row.making.recipe)
    if row.parent is not None:
        making["parent"] = described(table[row.parent], table)
    return making


def _complete(stated: Mapping[str, Any]) -> dict[str, Any]:
    from halfplate import methods
    from halfplate.errors import HalfplateError

    try:
        recipe = Recipe.from_mapping({**stated, "calibration": "self"})
        version = methods.METHODS.get(recipe.method).version
    except HalfplateError:
        return dict(stated)
    complete = recipe.fingerprint_json() | {"calibration": stated["calibration"], "method_version": version}
    if not recipe.budgeted:
        del complete["choose"]
    return complete


def format_of(made: Mapping[str, Any]) -> tuple[WeightSpec, bool] | None:
    """What a row's matrices are stored as, from `described`, whatever their sizes: rows of one format decode at one speed.

    The specification of a matrix, and whether input wrappers are shared. None where the matrices have formats of their own,
    and for rows that are no checkpoint by themselves.
    """
    from halfplate.errors import HalfplateError

    if made["kind"] == "Recovered":
        return format_of(made["parent"])
    if made["kind"] == "Rounded":
        before = format_of(made["parent"])
        return None if before is None else (replace(before[0], core_dtype=made["core_dtype"]), before[1])
    if made["kind"] != "Compressed":
        return None
    try:
        recipe = Recipe.from_mapping({**made["stated"], "calibration": "self"})
    except HalfplateError:
        return None
    if recipe.budgeted or recipe.ratios != "uniform":
        return None
    block = 0 if recipe.block_size == "auto" else recipe.block_size
    return recipe.spec(ANY_SIZE, ANY_SIZE, block), recipe.share_wrappers


def _one_shot(method: str, **changes: Any) -> Compressed:
    return Compressed({"method": method, "calibration": "text"} | changes)


def _armor(block: int, **changes: Any) -> Compressed:
    return _one_shot("armor", block_size=block, **changes)


ANY_SIZE = 1024
DEFAULT = {
    "objective and inputs": "gram, compressed inputs (default)",
    "steps of block tuning": "0 (default)",
    "calibration tokens": "32,768",
    "calibration text": "the model's field",
    "damping": "0 (default)",
    "token limit": "10 (default)",
}


def _dense_and_peers() -> list[Row]:
    tags = ("main", "low-bit", "peer")
    return [Row("dense", Dense(), tags)] + [
        Row(f"llama.cpp {kind}", LlamaCpp(kind), tags) for kind in ("Q8_0", "Q4_0", "Q4_K_M")
    ]


def _two_of_four(block: int) -> list[Row]:
    """Every method, and ARMOR's variants."""
    as_published = {"cross_damping": "none", "token_limit": "none"}
    of_text = ("main", "ablation", "calibration")
    return [
        Row("armor", _armor(block), of_text, DEFAULT | {"block size": f"{block} (default here)"}),
        *(
            Row(
                f"sparsegpt, {inputs} inputs, damping {damping}",
                _one_shot("sparsegpt", inputs=inputs, method_options={"damping": damping}, **as_published),
                ("main", "sparsegpt"),
            )
            for inputs in ("compressed", "dense")
            for damping in (0.01, 0.1)
        ),
        Row("armor, tuned", _armor(block, tune_block=480), ("main", "ablation"), {"steps of block tuning": "480"}),
        Row(
            "armor, diag, dense inputs",
            _armor(block, inputs="dense", method_options={"objective": "diag"}),
            ("main", "ablation"),
            {"objective and inputs": "diag, dense inputs (the paper's objective)"},
        ),
        Row(
            "armor, dense inputs",
            _armor(block, inputs="dense"),
            ("main", "ablation"),
            {"objective and inputs": "gram, dense inputs"},
        ),
        *(Row(method, _one_shot(method)) for method in ("magnitude", "wanda", "ria")),
        Row("ria, permuted", _one_shot("ria", method_options={"permute": True})),
        Row("nowag", _one_shot("nowag")),
        Row(f"slim, rank {block}", _one_shot("slim", block_size=block)),
        Row(f"denoiserotator, block {block}", _one_shot("denoiserotator", block_size=block)),
        *(
            Row(
                f"{method}, 4:8{', owl' * (ratios == 'owl')}",
                _one_shot(method, pattern="4:8", ratios=ratios),
                ("main", "owl"),
            )
            for method in ("wanda", "sparsegpt")
            for ratios in ("uniform", "owl")
        ),
        Row("armor, self", _armor(block, calibration="self"), of_text, {"calibration text": "self"}),
        Row("armor, C4", _armor(block, calibration="c4"), of_text, {"calibration text": "C4"}),
    ]


def _recovered(minutes: float) -> list[Row]:
    """`recover` after the best one-shot row, on the text it was calibrated on, and after `armor` without any text at hand."""
    own = Row(
        f"armor, {minutes:g} minutes of recovery on its own text",
        Recovered("armor", {"minutes": minutes}),
        ("recovery",),
    )
    with_text = Recovered("armor, tuned", {"minutes": minutes, "text": "text"})
    return [Row(f"armor, tuned, {minutes:g} minutes of recovery", with_text, ("main", "recovery")), own]


def _sparse_grids(block: int) -> list[Row]:
    tags = ("low-bit",)
    return [
        Row("armor int8", _armor(block, core_dtype="int8"), ("main", "low-bit")),
        Row("armor int4", _armor(block, core_dtype="int4"), ("main", "low-bit")),
        Row("armor int4, rounded after the fact", Rounded("armor", "int4"), tags),
        Row("armor int4, int8 wrappers", _armor(block, core_dtype="int4", wrapper_dtype="int8"), tags),
        Row(f"slim int4, rank {block}", _one_shot("slim", core_dtype="int4", block_size=block), tags),
        *_with_int8_activations("armor int8", "armor int4"),
    ]


def _dense_grids(block: int) -> list[Row]:
    """Dense cores between wrappers, and plain quantisation."""
    tags = ("low-bit",)
    found = [
        Row(
            f"armor dense {core}, int8 wrappers",
            _armor(block, pattern="dense", core_dtype=core, wrapper_dtype="int8"),
            tags,
        )
        for core in ("int4", "int3", "int2", "int8")
    ]
    found += [
        Row(f"{method} {core}, group 64", _one_shot(method, core_dtype=core, group_size=64), tags)
        for core in ("int4", "int3", "int8")
        for method in ("gptq", "rtn")
    ]
    # The same grid under both: groups of 128.
    found += [Row("gptq int3, group 128", _one_shot("gptq", core_dtype="int3"), tags)]
    found += [
        Row(f"armor dense {core}, no wrappers", _armor(0, pattern="dense", core_dtype=core), tags)
        for core in ("int3", "int2")
    ]
    return found + _with_int8_activations("armor dense int4, int8 wrappers", "armor dense int8, int8 wrappers")


def _with_int8_activations(*parents: str) -> list[Row]:
    return [Row(f"{parent}, int8 activations", Run(parent), ("low-bit", "int8 activations")) for parent in parents]


def _budgets(block: int) -> list[Row]:
    """The level of each matrix chosen under one budget."""
    return [
        *(Row(f"armor, {budget} of the bytes", _armor(block, budget=budget), ("budget",)) for budget in (0.5, 0.3)),
        Row("armor, 0.4 of the time", _armor(block, time_budget=0.4), ("budget", "quiet")),
    ]


def _ablations(block: int) -> list[Row]:
    """One setting at a time away from `armor`."""
    tags = ("ablation",)
    return [
        Row(
            "armor, diag, compressed inputs",
            _armor(block, method_options={"objective": "diag"}),
            tags,
            {"objective and inputs": "diag, compressed inputs"},
        ),
        *(
            Row(
                f"armor, {steps} steps of tuning",
                _armor(block, tune_block=steps),
                tags,
                {"steps of block tuning": str(steps)},
            )
            for steps in (40, 160)
        ),
        *(
            Row(
                f"armor, {samples} samples",
                _armor(block, samples=samples),
                (*tags, "calibration"),
                {"calibration tokens": f"{samples * 512:,}"},
            )
            for samples in (8, 16, 32, 128, 256)
        ),
        *(
            Row(f"armor, block {other}", _armor(other), tags, {"block size": str(other)})
            for other in (0, block // 2, 2 * block, 4 * block)
            if other % 4 == 0
        ),
        Row(
            "armor, shared wrappers",
            _armor(block, share_wrappers=True),
            tags,
            {"block size": f"{block}, input wrappers shared"},
        ),
        *(
            Row(
                f"armor, damping {damping}",
                _armor(block, method_options={"damping": damping}),
                tags,
                {"damping": str(damping)},
            )
            for damping in (0.001, 0.01)
        ),
        Row("armor, no token limit", _armor(block, token_limit="none"), tags, {"token limit": "none"}),
    ]
