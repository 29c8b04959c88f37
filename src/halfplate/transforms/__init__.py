"""Transforms, one file each, which turn a model into an equivalent or smaller one before it is planned and compressed.

To add one: write its file with a `Transform`, and add a line to `TRANSFORMS`. Other packages add theirs through an entry point of
the group `halfplate.transforms` (docs/extending.md).
"""

from collections.abc import Sequence
from typing import Any

from halfplate.errors import HalfplateError
from halfplate.registry import Registry
from halfplate.transforms.base import (
    Maker,
    MeasuredTransform,
    Piece,
    Probe,
    Settled,
    Statistics,
    Transform,
    WholeTransform,
    outline,
    pieces_of,
)

__all__ = [
    "CONVERSION",
    "TRANSFORMS",
    "Maker",
    "MeasuredTransform",
    "Piece",
    "Probe",
    "Settled",
    "Statistics",
    "Transform",
    "WholeTransform",
    "check_keep",
    "chosen",
    "find",
    "outline",
    "pieces_of",
]

CONVERSION = "conversion"  # the transform that is applied automatically


def _fault(found: Any, name: str) -> str | None:
    if not isinstance(found, Transform):
        return f"is a {type(found).__name__}, expected an instance of halfplate.transforms.Transform"
    missing = [part for part in ("name", "version", "summary") if not hasattr(found, part)]
    if missing:
        return f"lacks {', '.join(missing)}"
    return None if found.name == name else f"calls itself {found.name!r}"


TRANSFORMS: Registry[Transform] = Registry(
    "transforms",
    "halfplate.transforms",
    {
        CONVERSION: "halfplate.transforms.conversion:CONVERSION",
        "rotate": "halfplate.transforms.rotate:ROTATE",
        "depth": "halfplate.transforms.structure.depth:DEPTH",
        "magnitude-structured": "halfplate.transforms.structure.magnitude:MAGNITUDE",
        "wanda-structured": "halfplate.transforms.structure.wanda:WANDA",
        "flap": "halfplate.transforms.structure.flap:FLAP",
        "cfsp": "halfplate.transforms.structure.cfsp:CFSP",
        "tyr": "halfplate.transforms.structure.tyr:TYR",
        "nirvana": "halfplate.transforms.structure.nirvana:NIRVANA",
        "slicegpt": "halfplate.transforms.structure.slicegpt:SLICEGPT",
        "modegpt": "halfplate.transforms.structure.modegpt:MODEGPT",
        "reap": "halfplate.transforms.structure.reap:REAP",
        "stun": "halfplate.transforms.structure.stun:STUN",
        "expert-frequency": "halfplate.transforms.structure.frequency:FREQUENCY",
        "expert-merge": "halfplate.transforms.structure.merging:MERGING",
    },
    _fault,
)


def find(entry: str) -> Transform:
    """The transform `NAME` or `NAME@VERSION`.

    Raises HalfplateError with the nearest name if there is none, and for a version that is not installed.
    """
    name, at, version = entry.partition("@")
    found = TRANSFORMS.get(name)
    if at and version != str(found.version):
        raise HalfplateError(
            f"transforms={entry!r}: the installed {name} is version {found.version}; write {found.label!r}, or install the package that has the other version"
        )
    return found


def chosen(entry: str, keep: float | None) -> Transform:
    """The transform `NAME` or `NAME@VERSION`, for a result with `keep` times the parameters if it shrinks a model."""
    found = find(entry)
    return found.keeping(keep) if found.shrinks and keep is not None else found


def check_keep(entries: Sequence[str], keep: float | None) -> None:
    """Raise HalfplateError unless `keep` is a share for exactly one of the transforms `entries`, or None if none shrinks a model."""
    shrinking = [entry for entry in entries if find(entry).shrinks]
    if keep is None and not shrinking:
        return
    if keep is None:
        raise HalfplateError(
            f"transforms={shrinking[0]!r} needs keep, the fraction of the model's parameters that stay; try keep 0.75"
        )
    if not 0 < keep <= 1:
        raise HalfplateError(f"keep={keep} must be a fraction of the parameters, above 0 and at most 1; try 0.75")
    if len(shrinking) != 1:
        many = f"{len(shrinking)} do ({', '.join(shrinking)}): prune in several steps"
        raise HalfplateError(
            f"keep={keep} is for one transform that makes the model smaller, and {many if shrinking else 'none does: try flap'}"
        )
