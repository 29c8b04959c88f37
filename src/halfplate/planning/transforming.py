"""The transforms of a plan, with the memory and disk space that each needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfplate.errors import HalfplateError
from halfplate.models.reading import in_words
from halfplate.models.sources import Source, skeleton
from halfplate.transforms import CONVERSION, Transform, find, outline, pieces_of


@dataclass(frozen=True)
class TransformPlan:
    """One transform of a plan.

    label: `NAME@VERSION`.
    automatic: not named in the recipe.
    memory: peak bytes.
    disk: bytes of the model that it writes.
    """

    label: str
    automatic: bool
    memory: int
    disk: int

    def to_json(self) -> dict[str, Any]:
        """The entry of this transform in `plan --json`."""
        return {
            "name": self.label,
            "automatic": self.automatic,
            "memory_bytes": self.memory,
            "disk_bytes": self.disk,
        }


def plan_transforms(source: Source, names: Sequence[str]) -> tuple[Source, tuple[TransformPlan, ...]]:
    """The outline of the model that will be compressed, and the transforms that turn `source` into it.

    names: of the recipe, in order. Raises HalfplateError for a transform that does not support the model, with its reason.
    """
    plans: list[TransformPlan] = []
    conversion = find(CONVERSION)
    if conversion.refusal(source) is None:
        source = _planned(conversion, source, True, plans)
    for name in names:
        transform = find(name)
        try:
            refusal = transform.refusal(source)
            if refusal is None:
                source = _planned(transform, source, False, plans)
        except HalfplateError:
            raise
        # The code of another package can raise any exception.
        except Exception as error:
            raise HalfplateError(
                f"transforms={name!r} failed while planning ({in_words(error)}); leave it out, or update the package that it comes from"
            ) from error
        if refusal is not None:
            raise HalfplateError(f"transforms={name!r} does not support {source.name!r}: {refusal}; leave it out")
    return source, tuple(plans)


def _planned(transform: Transform, source: Source, automatic: bool, plans: list[TransformPlan]) -> Source:
    result = outline(transform, source)
    disk = sum(piece.nbytes for piece in pieces_of(skeleton(result)))
    plans.append(TransformPlan(transform.label, automatic, transform.held_nbytes(source), disk))
    return result
