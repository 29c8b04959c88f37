"""Putting a loaded model on its fastest path, and taking it back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, check_stored, connect
from halfplate.formats.plain import is_plain_linear
from halfplate.kernels import native
from halfplate.kernels.linear import ACTIVATIONS, unsupported
from halfplate.models.data_reads import stated_reads
from halfplate.runtime import decoder, semi_structured
from halfplate.runtime.embedding import StoredEmbedding
from halfplate.runtime.linear import PackedLinear

HEAD_DTYPES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class LinearPath:
    """How one linear runs, and why so where it is not the fastest way."""

    name: str
    path: str
    reason: str | None = None


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did: the path of each linear, and what decodes (`native`, or why it is Python)."""

    linears: tuple[LinearPath, ...]
    decoder: str

    def __str__(self) -> str:
        counts = Counter((linear.path, linear.reason) for linear in self.linears)
        lines = [
            f"{count} linears: {path}" + (f" ({reason})" if reason else "") for (path, reason), count in counts.items()
        ]
        return "\n".join([*lines, f"decoding: {self.decoder}"])


def check_options(activations: str, head_dtype: str | None) -> None:
    """Raise HalfplateError for values that `accelerate` does not know."""
    if activations not in ACTIVATIONS:
        raise HalfplateError(f"activations={activations!r} is not one of {', '.join(ACTIVATIONS)}")
    if head_dtype is not None and head_dtype not in HEAD_DTYPES:
        raise HalfplateError(f"head_dtype={head_dtype!r} is not one of {', '.join(HEAD_DTYPES)}")


@plain_defaults()
@torch.no_grad()
def accelerate(
    model: Any, activations: str = "float", head_dtype: str | None = None, dense_dtype: str | None = None
) -> Acceleration:
    """Replace the linears of a transformers model, compressed or dense, by the fastest that this machine has, in place.

    activations: `float`, or `int8` (a scale a token and 128 inputs) where cores are int8 or int4. head_dtype: how the output
    layer is stored for the runtime, `fp32`, `bf16` or `int8`; None takes bf16 where that is exact, else fp32. dense_dtype: the
    same for linears that are not compressed. Embeddings are kept in bf16 where that is exact. On CUDA, 2:4 cores go through torch's semi-structured products. What no kernel
    runs keeps its torch path, and the result says why. Raises HalfplateError for an unknown option and a damaged matrix.
    """
    check_options(activations, head_dtype)
    check_options(activations, dense_dtype)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    # A tied head is saved as the embedding, and one that is rounded here is not what the model holds.
    tied = head is not None and embedding is not None and embedding.weight is head.weight
    paths, read = list[LinearPath](), stated_reads(model)
    for name, module in list(model.named_modules()):
        if module is head and is_plain_linear(module):
            paths.append(_replace_head(model, name, module, head_dtype, activations, saved=not tied))
        elif type(module) is nn.Embedding and module.weight.device.type == "cpu":
            smaller = StoredEmbedding.of(module)
            if smaller is not None:
                model.set_submodule(name, smaller.train(module.training))
        elif isinstance(module, CompressedLinear | nn.Linear):
            kept = _kept(name, module, read)
            paths.append(
                LinearPath(name, "torch", kept) if kept else _replace(model, name, module, activations, dense_dtype)
            )
    return Acceleration(tuple(paths), decoder.install(model))


@torch.no_grad()
def accelerate_linears(module: nn.Module) -> None:
    """Replace the compressed linears below `module` by the fastest that this machine has, in place."""
    for name, linear in list(module.named_modules()):
        if isinstance(linear, CompressedLinear):
            _replace(module, name, linear, "float", None)


def explain(model: Any) -> Acceleration:
    """Which path each linear of a loaded model takes, and what decodes."""
    kinds = (PackedLinear, CompressedLinear, nn.Linear)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    read = stated_reads(model)
    paths = tuple(
        LinearPath(name, _spoken(module))
        if isinstance(module, PackedLinear)
        else LinearPath(name, "torch", _kept(name, module, read) or _why(module))
        for name, module in linears
    )
    return Acceleration(paths, decoder.why_not(model) or "native")


@plain_defaults()
def restore(model: Any) -> None:
    """Undo `accelerate`, in place: every linear becomes what it was packed from."""
    decoder.uninstall(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, module.restored())
        elif isinstance(module, StoredEmbedding):
            model.set_submodule(name, module.restored().train(module.training))
    connect(model)
    if hasattr(model, "tie_weights"):
        # By what was tied on loading: transformers leaves apart what the files hold with different values, whatever the config says.
        model.tie_weights(recompute_mapping=False)


def bf16_kernels(device: str) -> Callable[[nn.Linear], nn.Module] | None:
    """What puts the kernels with weights in bf16 in the place of a dense linear; None where `device` has none."""
    if torch.device(device).type != "cpu" or not native.available():
        return None
    return lambda linear: PackedLinear.of_dense(linear, "bf16")


def _kept(name: str, module: CompressedLinear | nn.Linear, read: Mapping[str, str]) -> str | None:
    """What keeps a linear in its place on every device: code that does more with it than multiply."""
    if isinstance(module, CompressedLinear):
        return None
    if not is_plain_linear(module):
        return f"{type(module).__name__} has a forward of its own"
    return f"its weight is read as data by {read[name]}" if name in read else None


def _why(module: nn.Module) -> str | None:
    """What keeps a linear of torch from the kernels, if anything does."""
    return unsupported(module.spec) if isinstance(module, CompressedLinear) else _native_reason()


def _replace(
    model: nn.Module, name: str, module: CompressedLinear | nn.Linear, activations: str, dense_dtype: str | None
) -> LinearPath:
    device = module.weight.device.type
    if device == "cuda" and isinstance(module, CompressedLinear):
        prepared = semi_structured.prepare(module)
        if isinstance(prepared, str):
            return LinearPath(name, "torch", prepared)
        model.set_submodule(name, prepared)
        return LinearPath(name, "semi-structured products of torch")
    if device != "cpu":
        return LinearPath(name, "torch", f"on device {device}")
    reason = _why(module)
    if reason is not None:
        return LinearPath(name, "torch", reason)
    try:
        packed = (
            PackedLinear.of_compressed(module, activations)
            if isinstance(module, CompressedLinear)
            else PackedLinear.of_dense(module, dense_dtype, activations)
        )
    except HalfplateError as refusal:
        if isinstance(module, CompressedLinear):
            check_stored(module.spec, module.stored(), name)  # says exactly what the packer only noticed
        raise HalfplateError(f"{name}: {refusal}") from None
    model.set_submodule(name, packed.train(module.training))
    return LinearPath(name, _spoken(packed))


def _replace_head(
    model: nn.Module, name: str, module: nn.Linear, head_dtype: str | None, activations: str, saved: bool
) -> LinearPath:
    reason = f"on device {module.weight.device.type}" if module.weight.device.type != "cpu" else _native_reason()
    if reason is not None:
        return LinearPath(name, "torch", reason)
    packed = PackedLinear.of_dense(module, head_dtype, activations)
    packed.saved = saved
    model.set_submodule(name, packed)
    return LinearPath(name, _spoken(packed))


def _native_reason() -> str | None:
    return None if native.available() else native.reason()


def _spoken(packed: PackedLinear) -> str:
    spec = packed.spec
    kind = "dense" if str(spec.pattern) == "dense" else str(spec.pattern)
    wrappers = f", wrappers {spec.wrapper_dtype}" if spec.format == "chain" else ""
    inputs = ", int8 activations" if packed.takes_bytes else ""
    return f"native {native.isa()} {kind} {spec.core_dtype}{wrappers}{inputs}"
