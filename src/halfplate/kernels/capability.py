"""What a backend supports, declared for each field of a specification. Anything that is not declared is not supported."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS, storage_of
from halfplate.formats.spec import WeightSpec

# Names of tensors below the module, for the declarations of backends; the bias is passed separately.
CORE = ("weight", "weight_index", "weight_scales")
# Scales and minima as quantizers of Halfplate store them, for backends that read them through the quantizer.
SCALES = tuple(
    f"weight_{name}"
    for quantizer in map(QUANTIZERS.get, QUANTIZERS.own)
    for name in storage_of(quantizer).layout(quantizer.stored, 1)
)
WRAPPERS = tuple(f"weight_{side}_{part}" for side in ("out", "in") for part in ("blocks", "tail", "scales"))


@dataclass(frozen=True)
class Field:
    """The supported values of one field of a specification.

    takes: whether it supports matrices with this value.
    refuses: why not, with `{value}` for the value.
    nearest: the nearest supported setting of the command line.
    """

    takes: Callable[[WeightSpec], bool]
    refuses: str = ""
    nearest: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not support a matrix, and the nearest supported setting."""

    reason: str
    nearest: str = ""


@dataclass(frozen=True)
class Capability:
    """The capabilities of a backend.

    fields: supported values of each field of a specification.
    tensors: known tensors; all others are refused.
    """

    fields: Mapping[str, Field]
    tensors: frozenset[str]

    def refusal(self, spec: WeightSpec) -> Refusal | None:
        """Why the backend does not support a matrix of `spec` on any machine; None if it does."""
        for field in fields(spec):
            known = self.fields.get(field.name)
            if known is None:
                return Refusal(f"no kernel supports {field.name}={getattr(spec, field.name)!r}")
            if not known.takes(spec) and field.name == "pattern" and spec.pattern.is_none:
                return Refusal("no kernel for a matrix without a core", "a method with a core, e.g. --method armor")
            if not known.takes(spec):
                return Refusal(known.refuses.format(value=getattr(spec, field.name)), known.nearest)
        for name in spec.layout():
            if name not in self.tensors:
                return Refusal(f"no kernel supports the tensor {name}")
        return None


def anything() -> Field:
    """A field whose values are all supported."""
    return Field(lambda _: True)


def one_of(name: str, values: Iterable[Any], refuses: str, nearest: str) -> Field:
    """A field with these supported values."""
    known = frozenset(values)
    return Field(lambda spec: getattr(spec, name) in known, refuses, nearest)


def pattern_of(values: Iterable[str], refuses: str, nearest: str) -> Field:
    """The supported patterns, as text."""
    known = frozenset(values)
    return Field(lambda spec: str(spec.pattern) in known, refuses, nearest)


# Fields for further parts, which no backend of Halfplate supports yet.
NO_RANK = one_of(
    "rank", (0,), "no kernel for a low-rank part (rank={value})", "a method without one, e.g. --method armor"
)
NO_ORDER = one_of("permuted", (False,), "no kernel for permuted inputs", "a method that leaves them in order")

NO_PARTS = Field(lambda spec: not spec.parts, "no kernel for {value}", "a method without such parts")


def check_tensors(spec: WeightSpec, tensors: Iterable[str]) -> None:
    """Raise HalfplateError for a tensor that is not part of `spec`, because ignoring it would silently give wrong results."""
    strangers = set(tensors) - spec.layout().keys() - {"bias"}
    if strangers:
        raise HalfplateError(
            f"{min(strangers)} is not a tensor of a matrix of {spec.format} {spec.pattern} {spec.core_dtype}; "
            "the file was written by another version, update halfplate"
        )
