"""Switching a loaded model to its fastest path, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, check_stored, connect
from halfplate.formats.plain import is_plain_linear
from halfplate.kernels.linear import ACTIVATIONS
from halfplate.models.data_reads import stated_reads
from halfplate.models.experts import experts_of
from halfplate.runtime import decoder
from halfplate.runtime.backends import Backend, Options, Packed, pack, pack_dense, refusal, refusal_of_dense
from halfplate.runtime.backends import backends as named_backends
from halfplate.runtime.embedding import StoredEmbedding

HEAD_DTYPES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class LinearPath:
    """How one linear runs, and the reason if it does not use a kernel."""

    name: str
    path: str
    reason: str | None = None


@dataclass(frozen=True)
class Acceleration:
    """The result of `accelerate`.

    linears: the path of each linear.
    decoder: how the model decodes, `native`, or why not.
    experts: the path of each module of experts.
    """

    linears: tuple[LinearPath, ...]
    decoder: str
    experts: tuple[LinearPath, ...] = ()

    def __str__(self) -> str:
        lines = [*_counted("linears", self.linears), *_counted("modules of experts", self.experts)]
        return "\n".join([*lines, f"decoding: {self.decoder}"])


def _counted(what: str, paths: Sequence[LinearPath]) -> list[str]:
    counts = Counter((each.path, each.reason) for each in paths)
    return [f"{count} {what}: {path}" + (f" ({reason})" if reason else "") for (path, reason), count in counts.items()]


def check_options(activations: str, head_dtype: str | None, dense_dtype: str | None = None) -> None:
    """Raise HalfplateError for invalid options of `accelerate`."""
    if activations not in ACTIVATIONS:
        raise HalfplateError(f"activations={activations!r} is not one of {', '.join(ACTIVATIONS)}; try auto")
    for name, value in (("head_dtype", head_dtype), ("dense_dtype", dense_dtype)):
        if value is not None and value not in HEAD_DTYPES:
            raise HalfplateError(
                f"{name}={value!r} is not one of {', '.join(HEAD_DTYPES)}; leave it out for the default"
            )


@plain_defaults()
@torch.no_grad()
def accelerate(
    model: Any,
    activations: str = "auto",
    head_dtype: str | None = None,
    dense_dtype: str | None = None,
    backends: Sequence[str] | None = None,
) -> Acceleration:
    """Replace the linears of a transformers model, compressed or not, by the fastest supported ones, in place.

    Embeddings are stored in bf16 if that is exact. On CUDA, 2:4 cores use torch's semi-structured products. A linear without a
    kernel keeps its torch path, and the result says why.

    activations: `float`; `int8` for cores on a grid (one scale per token and 128 inputs); or `auto`: from 4 tokens at once on int8, of 2:4 cores from 16, with the groups of the
        weights, if int8 is the fastest type of this machine, else float. The output head takes floats then.
    head_dtype: type of the output head in memory, `fp32`, `bf16` or `int8`; None chooses bf16 if that is exact, else fp32.
    dense_dtype: the same for linears that are not compressed.
    backends: names of the backends to use, in order of preference; None means all.
    Raises HalfplateError for an unknown option and a damaged matrix.
    """
    check_options(activations, head_dtype, dense_dtype)
    among, options = named_backends(backends), Options(activations, dense_dtype)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    # A tied head is saved as the embedding, and a head that is rounded here must not be saved.
    tied = head is not None and embedding is not None and embedding.weight is head.weight
    paths, read = list[LinearPath](), stated_reads(model)
    for name, module in list(model.named_modules()):
        if module is head and is_plain_linear(module):
            rounded = Options("float" if activations == "auto" else activations, head_dtype)
            paths.append(_replace(model, name, module, rounded, among, saved=not tied))
        elif type(module) is nn.Embedding and module.weight.device.type == "cpu":
            smaller = StoredEmbedding.of(module)
            if smaller is not None:
                model.set_submodule(name, smaller.train(module.training))
        elif isinstance(module, CompressedLinear | nn.Linear):
            kept = _kept(name, module, read)
            paths.append(LinearPath(name, "torch", kept) if kept else _replace(model, name, module, options, among))
    return Acceleration(tuple(paths), decoder.install(model), _experts(model))


@torch.no_grad()
def accelerate_linears(module: nn.Module) -> None:
    """Replace the compressed linears below `module` by the fastest supported ones that round no activations, in place."""
    among = named_backends()
    for name, linear in list(module.named_modules()):
        if isinstance(linear, CompressedLinear):
            _replace(module, name, linear, Options("float"), among)


def explain(model: Any) -> Acceleration:
    """Which path each linear of a loaded model uses, and how the model decodes."""
    among, read = named_backends(), stated_reads(model)
    paths = []
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            paths.append(LinearPath(name, module.path))
        elif isinstance(module, CompressedLinear | nn.Linear):
            paths.append(LinearPath(name, "torch", _kept(name, module, read) or _why(module, among)))
    return Acceleration(tuple(paths), decoder.why_not(model) or "native", _experts(model))


def _experts(model: nn.Module) -> tuple[LinearPath, ...]:
    """How the experts of each module run."""
    paths = []
    for name, module in experts_of(model).items():
        grouped = module.in_group()
        alone = grouped.count(False)
        path = "one by one" if alone == len(grouped) else "in one call"
        reason = f"{alone} of {len(grouped)} experts have linears that are not in kernel layout, and run one by one"
        paths.append(LinearPath(name, path, reason if alone else None))
    return tuple(paths)


@plain_defaults()
def restore(model: Any) -> None:
    """Undo `accelerate`, in place: every linear becomes the module that it was packed from."""
    decoder.uninstall(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Packed):
            model.set_submodule(name, module.restored())
        elif isinstance(module, StoredEmbedding):
            model.set_submodule(name, module.restored().train(module.training))
    connect(model)
    if hasattr(model, "tie_weights"):
        # As tied on loading: transformers does not tie tensors with different stored values, whatever the config says.
        model.tie_weights(recompute_mapping=False)


def bf16_kernels(device: str) -> Callable[[nn.Linear], nn.Module] | None:
    """A function that replaces an uncompressed linear by the kernels with bf16 weights; None if `device` has none."""
    among = named_backends()
    if refusal_of_dense(torch.device(device), among) is not None:
        return None

    def in_bf16(linear: nn.Linear) -> nn.Module:
        packed = pack_dense(linear, Options(dense_dtype="bf16"), among)
        return linear if isinstance(packed, str) else packed

    return in_bf16


def _kept(name: str, module: CompressedLinear | nn.Linear, read: Mapping[str, str]) -> str | None:
    """Why a linear is kept on every device: other code uses it for more than multiplication."""
    if isinstance(module, CompressedLinear):
        own = type(module).forward is not CompressedLinear.forward
        return f"{type(module).__name__} has a forward of its own" if own else None
    if not is_plain_linear(module):
        return f"{type(module).__name__} has a forward of its own"
    return f"its weight is read as data by {read[name]}" if name in read else None


def _why(module: CompressedLinear | nn.Linear, among: Sequence[Backend]) -> str | None:
    """What keeps a linear of torch from every backend, if anything does."""
    if isinstance(module, CompressedLinear):
        return refusal(module.spec, module.device, among)
    return refusal_of_dense(module.weight.device, among)


def _replace(
    model: nn.Module,
    name: str,
    module: CompressedLinear | nn.Linear,
    options: Options,
    among: Sequence[Backend],
    saved: bool = True,
) -> LinearPath:
    """Replace `module` by the linear that a backend packed. saved: whether the state dictionary includes it."""
    try:
        if isinstance(module, CompressedLinear):
            packed = pack(module, options, among)
        else:
            packed = pack_dense(module, options, among)
    except HalfplateError as refused:
        if isinstance(module, CompressedLinear):
            check_stored(module.spec, module.stored(), name)  # gives the exact error for damaged values
        raise HalfplateError(f"{name}: {refused}") from None
    if isinstance(packed, str):
        return LinearPath(name, "torch", packed)
    packed.saved = saved
    lender = None if packed.spec.same_as is None else model.get_submodule(packed.spec.same_as)
    if type(lender) is type(packed) and module.bias is None:
        # The same bytes, in memory once.
        for part, tensor in lender.named_buffers(recurse=False):
            setattr(packed, part, tensor)
    model.set_submodule(name, packed.train(module.training))
    return LinearPath(name, packed.path)
