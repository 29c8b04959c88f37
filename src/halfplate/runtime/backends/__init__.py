"""Backends, one file each: ways to run compressed linears that are faster than plain torch.

To add one: write its file with a `Backend`, and add a line to `BACKENDS`. Other packages add theirs through an entry point
of the group `halfplate.backends` (docs/extending.md). Backends are tried in the order of the registry; the first one that
supports a matrix runs it.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.kernels.capability import Capability, Field, Refusal, anything, one_of, pattern_of
from halfplate.registry import Registry
from halfplate.runtime.backends.base import Backend, CannotPack, Options, Packed

__all__ = [
    "BACKENDS",
    "Backend",
    "CannotPack",
    "Capability",
    "Field",
    "Options",
    "Packed",
    "anything",
    "backends",
    "one_of",
    "pack",
    "pack_dense",
    "pattern_of",
    "refusal",
    "refusal_of_dense",
    "without_kernel",
]


def _fault(found: Any, name: str) -> str | None:
    if not isinstance(found, Backend):
        return f"is a {type(found).__name__}, expected an instance of halfplate.runtime.backends.Backend"
    for method in ("refusal", "pack"):
        # These methods refuse what a backend does not declare, so they must not be overridden.
        if getattr(type(found), method) is not getattr(Backend, method):
            return f"overrides {method}, expected `unavailable` and `_pack`"
    missing = [part for part in ("name", "devices", "capability") if not hasattr(found, part)]
    return f"lacks {', '.join(missing)}" if missing else None


BACKENDS: Registry[Backend] = Registry(
    "backend",
    "halfplate.backends",
    {
        "cpu": "halfplate.runtime.backends.cpu:NATIVE_KERNELS",
        "cuda": "halfplate.runtime.backends.cuda:SEMI_STRUCTURED_PRODUCTS",
    },
    _fault,
)


def backends(names: Sequence[str] | None = None) -> list[Backend]:
    """The backends with these names, in this order. None means all, with a warning for broken backends of other packages.

    Raises HalfplateError for an unknown name, and for a broken package that is requested by name.
    """
    if names is not None:
        return [BACKENDS.get(name) for name in names]
    found = []
    for name in BACKENDS:
        try:
            found.append(BACKENDS.get(name))
        except HalfplateError as error:
            if name in BACKENDS.own:
                raise
            warnings.warn(str(error), HalfplateWarning, stacklevel=2)
    return found


def refusal(spec: WeightSpec, device: torch.device, among: Iterable[Backend]) -> str | None:
    """Why no backend runs a matrix of `spec` on `device`; None if one does."""
    refusals = []
    for backend in _for(device, among):
        refused = backend.refusal(spec, device)
        if refused is None:
            return None
        refusals.append((backend, refused.reason))
    return _spoken(refusals, device)


def refusal_of_dense(device: torch.device, among: Iterable[Backend]) -> str | None:
    """Why no backend packs an uncompressed linear on `device`; None if one does."""
    refusals = []
    for backend in _for(device, among):
        if backend.packs_dense:
            reason = backend.unavailable(device)
            if reason is None:
                return None
            refusals.append((backend, reason))
    return _spoken(refusals, device)


def pack(linear: CompressedLinear, options: Options, among: Iterable[Backend]) -> Packed | str:
    """`linear`, packed by the first backend that supports it, or the reasons of all that refused.

    Raises HalfplateError for a damaged matrix.
    """
    device, refusals = linear.device, []
    for backend in _for(device, among):
        refused = backend.refusal(linear.spec, device)
        if refused is None:
            try:
                return backend.pack(linear, options)
            except CannotPack as error:
                refused = Refusal(str(error))
        refusals.append((backend, refused.reason))
    return _spoken(refusals, device)


def pack_dense(linear: nn.Linear, options: Options, among: Iterable[Backend]) -> Packed | str:
    """`pack` for an uncompressed linear."""
    device, refusals = linear.weight.device, []
    for backend in _for(device, among):
        if backend.packs_dense:
            reason = backend.unavailable(device)
            if reason is None:
                return backend.pack_dense(linear, options)
            refusals.append((backend, reason))
    return _spoken(refusals, device)


def _for(device: torch.device, among: Iterable[Backend]) -> list[Backend]:
    return [backend for backend in among if device.type in backend.devices]


def _spoken(refusals: Sequence[tuple[Backend, str]], device: torch.device) -> str:
    if not refusals:
        return f"on device {device.type}"
    if len(refusals) == 1:
        return refusals[0][1]
    return "; ".join(f"{backend.name}: {reason}" for backend, reason in refusals)


def without_kernel(specs: Iterable[WeightSpec]) -> str | None:
    """One line that lists the matrices without a CPU kernel and the nearest settings that have one; None if all have a kernel.

    It does not depend on the machine; `halfplate doctor` says whether the kernels are built.
    """
    capabilities = [backend.capability for backend in backends() if "cpu" in backend.devices]
    counts, refusals = (
        Counter(specs),
        Counter[Refusal](),
    )  # even 100,000 matrices have only a few different specifications
    for spec, count in counts.items():
        refused = [capability.refusal(spec) for capability in capabilities]
        if None not in refused:
            refusals[refused[0] or Refusal("no kernel")] += count
    if not refusals:
        return None
    spoken = [
        f"{refusal.reason}{f', nearest setting with one: {refusal.nearest}' if refusal.nearest else ''}"
        for refusal, _ in refusals.most_common(3)
    ]
    return f"{refusals.total()} of {counts.total()} matrices have no kernel and run through torch, slower than the original model: {'; '.join(spoken)}"
