"""Quantizers, one file each: the values that a core of a few bits per weight can hold.

To add one: write its file, add a line to `QUANTIZERS`, and describe its values in docs/format.md. Its name is a value of
`core_dtype`. Other packages add theirs through an entry point (docs/extending.md); checkpoints name the package that reads them.
"""

from typing import Any

from halfplate.dtypes import STORED
from halfplate.formats.quantizers.base import Quantizer, has_scales_alone, storage_of, whole_numbers
from halfplate.formats.quantizers.uniform import Uniform
from halfplate.registry import Registry

__all__ = [
    "QUANTIZERS",
    "Quantizer",
    "Uniform",
    "core_dtypes",
    "has_scales_alone",
    "quantizer_of",
    "scaled_core_dtypes",
    "storage_of",
    "whole_numbers",
]


def _fault(found: Any, name: str) -> str | None:
    lacking = [
        part for part in ("name", "bits", "range", "stored", "nearest", "decode", "refit") if not hasattr(found, part)
    ]
    if lacking:
        return f"is not a Quantizer: it lacks {', '.join(lacking)}"
    return None if found.name == name else f"calls itself {found.name!r}"


QUANTIZERS: Registry[Quantizer] = Registry(
    "core_dtype",
    "halfplate.quantizers",
    {
        "int8": "halfplate.formats.quantizers.uniform:INT8",
        "int6": "halfplate.formats.quantizers.uniform:INT6",
        "int6k": "halfplate.formats.quantizers.uniform:INT6K",
        "affine5": "halfplate.formats.quantizers.affine:AFFINE5",
        "affine5k": "halfplate.formats.quantizers.affine:AFFINE5K",
        "int5": "halfplate.formats.quantizers.uniform:INT5",
        "nl5": "halfplate.formats.quantizers.table:NL5",
        "nl5k": "halfplate.formats.quantizers.table:NL5K",
        "affine4": "halfplate.formats.quantizers.affine:AFFINE4",
        "affine4k": "halfplate.formats.quantizers.affine:AFFINE4K",
        "int4": "halfplate.formats.quantizers.uniform:INT4",
        "nl4": "halfplate.formats.quantizers.table:NL4",
        "nl4k": "halfplate.formats.quantizers.table:NL4K",
        "nl4s": "halfplate.formats.quantizers.table:NL4S",
        "affine3": "halfplate.formats.quantizers.affine:AFFINE3",
        "affine3k": "halfplate.formats.quantizers.affine:AFFINE3K",
        "int3": "halfplate.formats.quantizers.uniform:INT3",
        "int3k": "halfplate.formats.quantizers.uniform:INT3K",
        "nl3": "halfplate.formats.quantizers.table:NL3",
        "nl3k": "halfplate.formats.quantizers.table:NL3K",
        "affine2": "halfplate.formats.quantizers.affine:AFFINE2",
        "affine2k": "halfplate.formats.quantizers.affine:AFFINE2K",
        "int2": "halfplate.formats.quantizers.uniform:INT2",
    },
    _fault,
)


def quantizer_of(core_dtype: str) -> Quantizer | None:
    """The quantizer of cores of `core_dtype`, None for floating-point cores; raises HalfplateError if it is unknown."""
    return None if core_dtype in STORED else QUANTIZERS.get(core_dtype)


def scaled_core_dtypes() -> tuple[str, ...]:
    """Halfplate's own quantizers whose values are a scale times a number that depends on the code alone."""
    return tuple(name for name in QUANTIZERS.own if has_scales_alone(QUANTIZERS.get(name)))


def core_dtypes() -> tuple[str, ...]:
    """All values of `core_dtype`."""
    return (*STORED, *QUANTIZERS)
