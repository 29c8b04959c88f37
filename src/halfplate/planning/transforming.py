"""The transforms of a plan, with the memory and disk space that each needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfplate.calibration import BATCH
from halfplate.errors import HalfplateError
from halfplate.models.reading import in_words
from halfplate.models.sources import Source, skeleton
from halfplate.recipe import Recipe
from halfplate.transforms import (
    CONVERSION,
    MeasuredTransform,
    Piece,
    Transform,
    WholeTransform,
    chosen,
    find,
    outline,
    pieces_of,
)

FP32 = 4


@dataclass(frozen=True)
class TransformPlan:
    """One transform of a plan.

    label: `NAME@VERSION`.
    automatic: not named in the recipe.
    memory: peak bytes.
    disk: bytes of the model that it writes, and of the statistics and hidden states before that.
    told: what it makes of the model, in words; empty if it says nothing.
    """

    label: str
    automatic: bool
    memory: int
    disk: int
    told: str = ""

    def to_json(self) -> dict[str, Any]:
        """The entry of this transform in `plan --json`."""
        return {
            "name": self.label,
            "automatic": self.automatic,
            "memory_bytes": self.memory,
            "disk_bytes": self.disk,
            **({"told": self.told} if self.told else {}),
        }


def plan_transforms(source: Source, recipe: Recipe) -> tuple[Source, tuple[TransformPlan, ...]]:
    """The outline of the model that will be compressed, and the transforms of the recipe that turn `source` into it, in order.

    Raises HalfplateError for a transform that does not support the model, with its reason.
    """
    plans: list[TransformPlan] = []
    conversion = find(CONVERSION)
    if conversion.refusal(source) is None:
        source = _planned(conversion, source, recipe, plans)
    for name in recipe.transforms:
        transform = chosen(name, recipe.keep)
        try:
            refusal = transform.refusal(source)
            if refusal is None:
                source = _planned(transform, source, recipe, plans)
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


def _planned(transform: Transform, source: Source, recipe: Recipe, plans: list[TransformPlan]) -> Source:
    result = outline(transform, source)
    disk = sum(piece.nbytes for piece in pieces_of(skeleton(result)))
    memory = transform.held_nbytes(source)
    if isinstance(transform, MeasuredTransform):
        measuring, written = _measuring(transform, source, recipe)
        memory, disk = max(memory, measuring), disk + written
    automatic = transform.name == CONVERSION
    plans.append(TransformPlan(transform.label, automatic, memory, disk, transform.described(source)))
    return result


def _measuring(transform: MeasuredTransform, source: Source, recipe: Recipe) -> tuple[int, int]:
    """The memory while text runs through the layers, and the disk space of hidden states and statistics."""
    pieces, config = pieces_of(skeleton(source)), source.config.get_text_config()
    if isinstance(transform, WholeTransform):
        held = transform.measuring_nbytes(source, recipe.seq_len)
        return held, transform.statistics_nbytes(source) * config.num_hidden_layers
    kept, tokens = transform.statistics_nbytes(source), recipe.samples * recipe.seq_len
    hidden = FP32 * min(BATCH, recipe.samples) * recipe.seq_len * config.hidden_size
    wide = FP32 * min(BATCH, recipe.samples) * recipe.seq_len * _widest(pieces)
    outer = sum(piece.nbytes for piece in pieces if piece.index is None)
    layer = max(piece.nbytes for piece in pieces if piece.index is not None)
    # A sum is fp64, and held at the same time as what is added to it.
    memory = max(outer + layer, layer + wide + 6 * kept) + 6 * hidden + 3 * wide
    return memory, kept * config.num_hidden_layers + 2 * FP32 * tokens * config.hidden_size


def _widest(pieces: list[Piece]) -> int:
    """The most outputs of a linear in the layers."""
    return max(
        max(shape) for piece in pieces if piece.index is not None for _, shape in piece.entries.values() if shape
    )
