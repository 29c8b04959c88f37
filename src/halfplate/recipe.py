"""The typed, versioned settings of one compression: read from YAML, overridden by flags, recorded in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Unpack, get_type_hints

from halfplate import methods, transforms
from halfplate.allocation import CHOSEN, Evolution
from halfplate.allocation.asked import CONTEXT, check_budget
from halfplate.allocation.ratios import UNIFORM
from halfplate.allocation.ratios.asked import formats_asked
from halfplate.allocation.targets import HALFPLATE
from halfplate.arguments import path_text, size_in_bytes, typed
from halfplate.calibration.mixture import parts_of, sampled_samples, samples_of
from halfplate.device import device_kind
from halfplate.effort import WORK, Effort
from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.rounding import GROUP
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method
from halfplate.pattern import Pattern
from halfplate.recipe_values import (
    DEFAULT_METHOD,
    RecipeFields,
    file_values,
    laid_over,
    typed_by,
    types_in,
    without_recipe,
)
from halfplate.registry import available, unknown

VERSION = 1
# Values of embedding_dtype and head_dtype beside the quantizers: as the model has it, and Halfplate's choice.
KEEP, AUTO = "keep", "auto"
# Neither changes the result: they are no part of what makes two runs the same.
WITHOUT_EFFECT = ("threads", "max_kl")


def pattern_of(method: str) -> str:
    """The pattern for `auto`: `2:4`, `dense` for a method that does not prune, or `none` for one that makes no core."""
    found = methods.METHODS.get(method)
    return "none" if found.coreless else "2:4" if found.sparse else "dense"


@dataclass(frozen=True)
class Recipe:
    """All settings of a compression, checked when they are created.

    - version: of this object
    - method, method_options: a name of `halfplate methods`, and its options, e.g. `{"iterations": 20}`
    - pattern: `N:M`, `dense`, `none`, or `auto` (`dense` if the method does not prune, `none` if it makes no core, else `2:4`)
    - core_dtype, wrapper_dtype: data types of kept values and wrappers
    - types: `PATTERN=TYPE`, the core_dtype of matrices whose full name matches a shell pattern; the first that matches counts.
      `PATTERN=TYPE:COLUMNS` also sets their group_size
    - block_size: `auto` (chosen by the plan), 0 for no wrappers, 1 for diagonal wrappers; for slim the rank
    - out_block_size: that of the output wrapper, if it differs
    - share_wrappers: linears with the same input share one input wrapper
    - group_size: columns that share a scale of an integer core
    - embedding_dtype, head_dtype: a quantizer, `keep` for the type of the model, or `auto` (int8); a tied pair has one
    - inputs: statistics of the inputs from the `compressed` layers so far, or from the original layers (`dense`)
    - cross_damping: of the correction towards the original outputs with compressed inputs, `none` for no correction
    - token_limit: clip the squared norm of each token to this many times the median
    - expert_tokens: the tokens that are routed to an expert count `equal`ly, or by the square of their routing weight (`gated`)
    - precision: of matrix products during calibration; `auto` is bf16 if the processor multiplies it faster
    - tune_block: steps that train each layer towards the output of the original layer
    - ratios: the rule by which layers keep unequal shares with the same average, a name in `halfplate.allocation.ratios.RATIOS`; `welore` for ranks of method svd, or `uniform`
    - owl_lambda: half the difference between the largest and the smallest share of `owl` and `farms`
    - budget, time_budget: fraction of the original bytes, or of the decode time of the original linears on this machine
    - fit, fit_ram: bytes of the whole result in its file, or in memory with a cache of `context` tokens; text such as `600MB` is converted
    - target: program that runs the result, a name in `halfplate.allocation.TARGETS`, whose formats are the candidates
    - choose: fields that a budget chooses for each matrix (block_size, pattern, core_dtype)
    - search: `knapsack` over measured errors, or `evolution`, which continues from there with the KL of the model
    - generations, offspring: of the evolution
    - transforms: names of `halfplate.transforms`, applied to the model first, in order; each becomes `name@version`
    - keep: fraction of the model's parameters that stay after the transform that makes it smaller
    - calibration: `self`, a text file or a Hub data set; or several as `SOURCE:SHARE`, shares of the sequences
    - effort: `quick`, `normal` or `best`: number of samples, and iterations of the method, where the recipe leaves them open
    - samples, seq_len: number and length of the calibration sequences
    - seed: of all random numbers
    - device: `cpu` or `cuda`
    - include, exclude: shell patterns on full module names
    - threads: None leaves torch's own choice
    - max_kl: nats per token

    Raises HalfplateError naming the field, its value and a value that works.
    """

    version: int = VERSION
    method: str = DEFAULT_METHOD
    method_options: Mapping[str, Any] = field(default_factory=dict)
    pattern: str = "auto"
    block_size: int | Literal["auto"] = "auto"
    out_block_size: int | None = None
    share_wrappers: bool = False
    core_dtype: str = "bf16"
    types: tuple[str, ...] = ()
    wrapper_dtype: str = "bf16"
    group_size: int = GROUP
    embedding_dtype: str = KEEP
    head_dtype: str = KEEP
    transforms: tuple[str, ...] = ()
    keep: float | None = None
    calibration: str | tuple[str, ...] = "self"
    effort: Effort = "normal"
    samples: int = None  # type: ignore[assignment]  # that of the effort
    seq_len: int = 512
    seed: int = 0
    inputs: Literal["dense", "compressed"] = "compressed"
    cross_damping: float | Literal["none"] = 1.0
    token_limit: float | Literal["none"] = 10.0
    expert_tokens: Literal["equal", "gated"] = "equal"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    tune_block: int = 0
    ratios: str = UNIFORM
    owl_lambda: float = 0.08
    budget: float | None = None
    time_budget: float | None = None
    fit: int | None = None
    fit_ram: int | None = None
    context: int = CONTEXT
    target: str = HALFPLATE.name
    choose: tuple[str, ...] = CHOSEN
    search: Literal["knapsack", "evolution"] = "knapsack"
    generations: int = 20
    offspring: int = 16
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        for name in ("fit", "fit_ram"):
            object.__setattr__(self, name, size_in_bytes(name, getattr(self, name)))
        if self.samples is None:
            object.__setattr__(self, "samples", WORK[typed("effort", self.effort, Effort)].samples)
        hints = get_type_hints(type(self))
        for name in (f.name for f in fields(self) if f.name != "method_options"):
            object.__setattr__(self, name, typed(name, getattr(self, name), hints[name]))
        if self.version != VERSION:
            raise HalfplateError(
                f"version={self.version} of the recipe is unknown to this Halfplate; expected {VERSION}, try a newer Halfplate"
            )
        if not isinstance(self.method_options, Mapping):
            raise HalfplateError(
                f"method_options={self.method_options!r} is not a mapping; write one `name: value` per line below it"
            )
        options = _typed_options(methods.METHODS.get(self.method), self.method_options)
        object.__setattr__(self, "method_options", options)
        object.__setattr__(self, "transforms", tuple(transforms.find(entry).label for entry in self.transforms))
        transforms.check_keep(self.transforms, self.keep)
        if self.pattern == "auto":
            object.__setattr__(self, "pattern", pattern_of(self.method))
        self._check_shape()
        for name in ("embedding_dtype", "head_dtype"):
            if getattr(self, name) not in (KEEP, AUTO, *QUANTIZERS):
                raise unknown(name, getattr(self, name), [KEEP, AUTO, *QUANTIZERS])
        for name, least in (
            ("samples", 1),
            ("seq_len", 2),
            ("seed", 0),
            ("tune_block", 0),
            ("context", 1),
            ("generations", 0),
            ("offspring", 1),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**63:
                raise HalfplateError(f"{name}={value} is out of range; expected at least {least}")
        if self.token_limit != "none" and not 0 < self.token_limit < float("inf"):
            raise HalfplateError(f"token_limit={self.token_limit} must be a positive number, or none; try 10")
        if self.tune_block and self.inputs != "compressed":
            raise HalfplateError(
                f"tune_block={self.tune_block} needs inputs='compressed', received {self.inputs!r}; use inputs compressed"
            )
        check_budget(self)
        self._check_ratios()
        if self.cross_damping != "none" and not 0 <= self.cross_damping < float("inf"):
            raise HalfplateError(
                f"cross_damping={self.cross_damping} must be a finite number, 0 or more, or none; try 1.0"
            )
        if self.max_kl is not None and not self.max_kl > 0:
            raise HalfplateError(f"max_kl={self.max_kl} must be above 0 nats per token; try 1.0")
        device_kind(self.device)
        if isinstance(self.calibration, tuple) and len(self.calibration) == 1:
            object.__setattr__(self, "calibration", self.calibration[0])
        samples_of(parts_of(self.calibration), self.samples)
        for name in ("method", "calibration"):
            if not "".join(getattr(self, name)).strip():
                raise HalfplateError(f"{name}={getattr(self, name)!r} is empty; leave it out for the default")

    def _check_ratios(self) -> None:
        for found in formats_asked(self):
            spec = self.spec(1, max(found.pattern.m, self.group_size), 0, found.core_dtype)
            self.create_method().check_spec(replace(spec, pattern=found.pattern))

    @property
    def evolution(self) -> Evolution | None:
        """The evolutionary search after the knapsack, if any."""
        return Evolution(self.generations, self.offspring, self.seed) if self.search == "evolution" else None

    @cached_property
    def sampled(self) -> int:
        """How many of the calibration sequences the model generates itself."""
        return sampled_samples(self.calibration, self.samples)

    @property
    def budgeted(self) -> bool:
        """Whether a budget chooses the formats of the matrices."""
        return self.sized or self.time_budget is not None

    @property
    def asks_size(self) -> bool:
        """Whether the whole result has a size to fit in."""
        return self.fit is not None or self.fit_ram is not None

    @property
    def sized(self) -> bool:
        """Whether a budget in bytes chooses them."""
        return self.budget is not None or self.asks_size

    def _check_shape(self) -> None:
        method, pattern, block = self.create_method(), self.parsed_pattern, self.block_size
        if block == "auto":
            block = 0
        elif block < 0:
            raise HalfplateError(
                f"block_size={block} is negative; expected auto, 0 (no wrappers), 1 (diagonal) or a multiple of {pattern.m}"
            )
        elif block > 0 and not (method.wrapped or method.low_rank):
            raise HalfplateError(
                f"block_size={block} needs a method with wrappers, and {self.method!r} has none; try --method armor or --block-size 0"
            )
        for name in ("out_block_size", "share_wrappers"):
            if getattr(self, name) and not method.wrapped:
                raise HalfplateError(
                    f"{name}={getattr(self, name)} needs a method with wrappers, and {self.method!r} has none; try --method armor, or leave it out"
                )
        if self.out_block_size is not None and self.out_block_size < 0:
            raise HalfplateError(
                f"out_block_size={self.out_block_size} is negative; expected 0 (no wrapper), 1 (diagonal) or a block size"
            )
        if self.share_wrappers and self.types:
            raise HalfplateError(
                f"share_wrappers=True with types={', '.join(self.types)}: matrices that share a wrapper have one type; leave one of them out"
            )
        if self.share_wrappers and self.block_size == 0:
            raise HalfplateError("share_wrappers=True with block_size=0 has no wrapper to share; try --block-size 16")
        # The size of a matrix without a core depends on its shape; the plan checks that.
        check = partial(Method.check_spec, method) if method.coreless else method.check_spec
        for core_dtype, group in ((self.core_dtype, None), *types_in(self.types)):
            check(self._form(1, pattern.m, block, core_dtype, group))
        scaled = self.core_dtype in QUANTIZERS or self.budgeted or {self.embedding_dtype, self.head_dtype} != {KEEP}
        if self.group_size != GROUP and not scaled:
            raise HalfplateError(
                f"group_size={self.group_size} is for quantised cores, and core_dtype={self.core_dtype!r} has no scales; "
                f"leave it out or use {', '.join(QUANTIZERS)}"
            )
        if pattern.is_dense and self.core_dtype not in QUANTIZERS:
            raise HalfplateError(
                f"core_dtype={self.core_dtype!r} makes pattern dense no smaller than the model; use {' or '.join(QUANTIZERS)}"
            )

    def core_of(self, name: str) -> tuple[str, int]:
        """The type of the core of the matrix with the full name `name`, and its columns that share a scale."""
        core_dtype, group = typed_by(self.types, name) or (self.core_dtype, None)
        return core_dtype, self.group_size if group is None else group

    def spec(
        self, d_out: int, d_in: int, block: int, core_dtype: str | None = None, group: int | None = None
    ) -> WeightSpec:
        """The specification of a matrix: with wrappers of block size `block`, or a low-rank part of equal size, depending on the method."""
        spec, method = self._form(d_out, d_in, block, core_dtype, group), self.create_method()
        return method.sized(spec) if method.coreless and spec.pattern.is_none else spec

    def _form(self, d_out: int, d_in: int, block: int, core_dtype: str | None, group: int | None = None) -> WeightSpec:
        """`spec` before the method has decided on the size of parts without a core."""
        method = self.create_method()
        wrapper, rank = (0, block) if method.low_rank else (block, 0)
        out_wrapper = wrapper if self.out_block_size is None else self.out_block_size
        return WeightSpec(
            d_out,
            d_in,
            self.parsed_pattern,
            core_dtype or self.core_dtype,
            out_wrapper,
            wrapper,
            self.wrapper_dtype,
            rank,
            method.permutes,
            self.group_size if group is None else group,
            parts=method.parts,
        )

    @cached_property
    def parsed_pattern(self) -> Pattern:
        """The pattern as N and M."""
        return Pattern.parse(self.pattern)

    def create_method(self) -> Method:
        """The method with its options. Its seed, if it has one, is that of the recipe unless the options set it."""
        return self._method

    @cached_property
    def _method(self) -> Method:
        seeded = any(f.name == "seed" for f in fields(methods.METHODS.get(self.method)))
        method = methods.create(self.method, **{**({"seed": self.seed} if seeded else {}), **self.method_options})
        return method.at_effort(self.effort)

    @classmethod
    def of(cls, recipe: Recipe | str | Path | None = None, **changes: Unpack[RecipeFields]) -> Recipe:
        """A recipe, a YAML file, or the defaults, overridden by `changes`.

        If neither chooses a format (`recipe_values.FORMAT`), the defaults are those of the built-in recipe `everyday`.
        Raises HalfplateError as `from_yaml` and Recipe do, and for a name that is not a field.
        """
        # Checked here, so that a misspelt keyword gives a proper error.
        values: dict[str, Any] = dict(changes)
        for name in values:
            if name not in {f.name for f in fields(cls)}:
                raise unknown("option", name, [f.name for f in fields(cls)])
        if recipe is None:
            return cls(**without_recipe(values))
        if isinstance(recipe, Recipe):
            return replace(recipe, **values)
        return cls.from_yaml(path_text("recipe", recipe), **values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Create a recipe from plain values; raises HalfplateError for an unknown key, with the nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise HalfplateError(f"{source}: key {key!r} is unknown; {available(str(key), known)}")
        return cls(**values)

    @classmethod
    def from_record(cls, values: Any) -> Recipe | None:
        """The recipe in the record of a checkpoint, which is untrusted; None if it is not one that this installation knows."""
        try:
            return cls.from_mapping(values) if isinstance(values, dict) and values else None
        except (HalfplateError, TypeError):
            return None

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> Recipe:
        """Read a recipe file, or a built-in recipe by its name, overridden by `changes`.

        Options of the method are added to those of the file, unless the method itself changes. Raises HalfplateError if the file is
        missing, is not a YAML mapping, or holds an invalid value.
        """
        return cls.from_mapping(laid_over(file_values(path), changes), source=f"recipe {str(path)!r}")

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_mapping` reads back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {
            "method_options": dict(self.method_options),
            "calibration": list(self.calibration) if isinstance(self.calibration, tuple) else self.calibration,
            "transforms": list(self.transforms),
            "choose": list(self.choose),
            "types": list(self.types),
            "include": list(self.include),
            "exclude": list(self.exclude),
        }

    def fingerprint_json(self) -> dict[str, Any]:
        """`to_json` without the fields that do not affect the result."""
        values = {key: value for key, value in self.to_json().items() if key not in WITHOUT_EFFECT}
        # A recipe that leaves these out is what it was before there were any.
        later: dict[str, Any] = {
            "transforms": [],
            "keep": None,
            "embedding_dtype": KEEP,
            "head_dtype": KEEP,
            "target": HALFPLATE.name,
            "effort": "normal",
            "types": [],
        }
        later |= {"fit": None, "fit_ram": None, "context": CONTEXT}
        return {key: value for key, value in values.items() if key not in later or value != later[key]}


def defaults_of(recipe: Recipe) -> dict[str, Any]:
    """The value that every field has unless one is given; that of `samples` depends on the effort."""
    found = {each.name: each.default for each in fields(Recipe) if each.default is not MISSING}
    return found | {"samples": WORK[recipe.effort].samples}


def _typed_options(method: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert each option to the type of the method's field; unknown names are left to `methods.create`."""
    hints = get_type_hints(method)
    known = {f.name for f in fields(method)}
    return {
        str(name): typed(str(name), value, hints[name]) if name in known else value for name, value in options.items()
    }
