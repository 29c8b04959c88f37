"""The parts of a compressed matrix, one file each. A part defines its stored tensors, checks, product, full matrix, row selection and training.

To add one: write its file, add a line to `PARTS`, and describe its tensors in docs/format.md. Other packages add theirs through
an entry point (docs/extending.md). Code outside `formats/` does not list parts.
"""

from functools import cache
from typing import TYPE_CHECKING

from halfplate.formats.parts.base import Part
from halfplate.registry import Registry

if TYPE_CHECKING:
    from halfplate.formats.spec import WeightSpec

# From the core outwards; each is applied around those before it (halfplate.formats.chain).
PARTS: Registry[type[Part]] = Registry(
    "part",
    "halfplate.parts",
    {
        "core": "halfplate.formats.parts.core:NMSparse",
        "no_core": "halfplate.formats.parts.no_core:NoCore",
        "out_wrapper": "halfplate.formats.parts.wrapper:OutWrapper",
        "in_wrapper": "halfplate.formats.parts.wrapper:InWrapper",
        "low_rank": "halfplate.formats.parts.low_rank:LowRank",
        "permutation": "halfplate.formats.parts.permutation:Permutation",
        "bit_stack": "halfplate.formats.parts.bit_stack:BitStack",
        "dictionary": "halfplate.formats.parts.dictionary:Dictionary",
        "monarch": "halfplate.formats.parts.monarch:Monarch",
        "group_sparse": "halfplate.formats.parts.group_sparse:GroupSparse",
    },
    lambda found, name: None if isinstance(found, type) and issubclass(found, Part) else "is not a subclass of Part",
)
# Parts that have their own fields in a specification; others are listed in its `parts`.
FIRST = ("core", "no_core", "out_wrapper", "in_wrapper", "low_rank", "permutation")


@cache
def part_class(name: str) -> type[Part]:
    """The class registered under `name`; raises HalfplateError if there is none."""
    return PARTS.get(name)


def classes_of(spec: "WeightSpec") -> "tuple[type[Part], ...]":
    """The classes of the parts of a matrix of `spec`, from the core outwards."""
    found = [part for part in map(part_class, FIRST) if part.present(spec)]
    return (*found, *(part_class(extra.name) for extra in spec.parts))
