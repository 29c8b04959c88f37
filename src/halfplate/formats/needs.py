"""Requirements of a checkpoint beyond version 1 of the format: later parts and quantizers, or those of other packages."""

from collections.abc import Iterable
from typing import Any

from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.parts import FIRST, PARTS
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.quantizers.rounding import GROUPS
from halfplate.formats.spec import WeightSpec
from halfplate.registry import Registry
from halfplate.version import package_version

# Part of version 1, so every reader has them.
FIRST_QUANTIZERS = ("int8", "int4", "int3", "int2")
LINEAR_EXPERTS = "layout linear-experts"  # experts are stored one by one, as `….experts.17.gate_proj` (docs/format.md)
SMALL_GROUPS = "layout groups-of-16"  # version 1 has groups of 32, 64 and 128
NO_CORE = "layout no-core"  # every matrix of version 1 has a core
LAYOUTS = (LINEAR_EXPERTS, SMALL_GROUPS, NO_CORE)
KINDS: dict[str, Registry[Any]] = {"part": PARTS, "quantizer": QUANTIZERS}


def needs_of(specs: Iterable[WeightSpec], layouts: Iterable[str] = ()) -> dict[str, str]:
    """The package and version that reads each later part (`part NAME`) and quantizer (`quantizer NAME`) of `specs`, and each of `layouts`."""
    specs = list(specs)
    layouts = [*layouts, *([SMALL_GROUPS] if any(spec.group < GROUPS[1] for spec in specs) else [])]
    layouts += [NO_CORE] if any(spec.pattern.is_none for spec in specs) else []
    names = {
        *(("part", extra.name) for spec in specs for extra in spec.parts),
        *(("quantizer", spec.core_dtype) for spec in specs),
    }
    known = {*(("part", name) for name in FIRST), *(("quantizer", name) for name in (*STORED, *FIRST_QUANTIZERS))}
    ours = f"halfplate {package_version()}"
    found = {f"{kind} {name}": KINDS[kind].package(name) or ours for kind, name in sorted(names - known)}
    return found | dict.fromkeys(layouts, ours)


def check_known(needs: Any) -> None:
    """Raise HalfplateError, naming the package and its version, if one of `needs` is not registered here."""
    if not isinstance(needs, dict) or not all(isinstance(package, str) for package in needs.values()):
        raise HalfplateError(
            f"quantization_config.needs={needs!r} must be an object of package names; the checkpoint is damaged, write it again"
        )
    for what, package in needs.items():
        kind, _, name = str(what).partition(" ")
        if what in LAYOUTS:
            continue
        if kind not in KINDS or name not in KINDS[kind]:
            raise HalfplateError(
                f"quantization_config.needs: halfplate {package_version()} does not know the {what} of this checkpoint, which {package} wrote; "
                f"install that or a later version"
            )
