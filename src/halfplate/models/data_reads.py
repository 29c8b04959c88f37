"""Finding linears whose weight is read by other code than their own forward."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import nn

from halfplate.models.arguments import cache_argument
from halfplate.models.without_values import run_without_values

# Methods that create or initialise weights; they do not run on a loaded model.
INITIALISER = re.compile("_*(init|reset)")


@dataclass(frozen=True)
class _Read:
    """`<owner>.weight` in a method of a class. path: of the owner below `self`, None if it is reached otherwise."""

    path: tuple[str, ...] | None
    kind: type
    method: str

    def __str__(self) -> str:
        return f"{self.kind.__name__}.{self.method}"


def stated_reads(root: nn.Module) -> dict[str, str]:
    """The linears below `root` whose weight is read in the source code of a module, with the method that reads it, by name.

    Methods that initialise weights, code that only runs in training, and weights that are reached other than by
    `self.<name>.weight` are ignored here; `data_reads` finds the latter.
    """
    return {name: str(reads[0][1]) for name, reads in _stated(root).items()}


def data_reads(model: nn.Module, prefix: str = "") -> tuple[dict[str, str], str | None]:
    """The linears below `prefix` whose weight is read as data, with the reason for each, and why tracing failed, if it did.

    If the source code is ambiguous, the model runs on the meta device, once for a text and once for the next token.
    A method that did not run there may run elsewhere (e.g. in a GPU kernel), so reads in its source still count.
    """
    root = model.get_submodule(prefix)
    stated = _stated(root)
    if not stated and not _doubtful(root):
        return {}, None
    seen, ran, failure = _run(model, root, stated)
    reasons = dict.fromkeys(seen, "the code of the model")
    for name, reads in stated.items():
        # If a method ran without taking a branch, the branch depends only on the configuration.
        hidden = [read for owner, read in reads if failure is not None or (owner, read) not in ran]
        if name in seen or hidden:
            reasons[name] = str((hidden or [read for _, read in reads])[0])
    start = f"{prefix}." if prefix else ""
    return {
        start + name: f"its weight is read as data by {by}; not compressed" for name, by in reasons.items()
    }, failure


def reader_of(root: nn.Module, module: nn.Module) -> str | None:
    """The method below `root`, other than those of its own class, whose source code reads the weight of `module`; None if there is none."""
    owner: Any
    for owner in root.modules():
        for read in _reads_of(owner.__class__):
            if owner is not module and read.path is not None and reduce(_child, read.path, owner) is module:
                return str(read)
    return None


def _stated(root: nn.Module) -> dict[str, list[tuple[str, _Read]]]:
    """For each linear that is read, by name: the module that reads it, and where."""
    found: dict[str, list[tuple[str, _Read]]] = {}
    for name, module in root.named_modules():
        # The code of torch is not searched: this is its only module that reads the weight of a linear.
        attention = [_Read(("out_proj",), nn.MultiheadAttention, "forward")]
        for read in attention if isinstance(module, nn.MultiheadAttention) else _reads_of(module.__class__):
            target = None if read.path is None else reduce(_child, read.path, module)
            if isinstance(target, nn.Module) and hasattr(target, "in_features"):
                found.setdefault(".".join(filter(None, (name, *(read.path or ())))), []).append((name, read))
    return found


def _child(module: Any, name: str) -> Any:
    return getattr(module, name, None)


def _doubtful(root: nn.Module) -> bool:
    """Whether any code of the modules reaches a weight other than by `self.<name>.weight`."""
    kinds = {kind for module in root.modules() for kind in type(module).__mro__}
    return any(read.path is None for kind in kinds for read in _reads_of(kind)) or any(
        _functions_read(kind.__module__) for kind in kinds if _foreign(kind)
    )


def _foreign(kind: type) -> bool:
    return issubclass(kind, nn.Module) and kind.__module__.partition(".")[0] not in ("torch", "halfplate")


@cache
def _reads_of(kind: type[Any]) -> tuple[_Read, ...]:
    """Every read of a weight in the methods of a class and its base classes."""
    return tuple(
        _Read(path, base, method.name)
        for base in filter(_foreign, kind.__mro__)
        for method in _methods(base)
        if not INITIALISER.match(method.name)
        for path in _owners(method)
    )


def _methods(kind: type) -> list[ast.FunctionDef]:
    for node in _parsed(kind.__module__):
        if isinstance(node, ast.ClassDef) and node.name == kind.__qualname__:
            return [part for part in node.body if isinstance(part, ast.FunctionDef)]
    return []


@cache
def _functions_read(module: str) -> bool:
    """Whether a module-level function of `module` reads a weight."""
    functions = [node for node in _parsed(module) if isinstance(node, ast.FunctionDef)]
    return any(True for function in functions for _ in _owners(function))


@cache
def _parsed(module: str) -> list[ast.stmt]:
    try:
        return ast.parse(inspect.getsource(sys.modules[module])).body
    except (KeyError, OSError, TypeError, SyntaxError):
        return []


def _owners(node: ast.AST) -> Iterator[tuple[str, ...] | None]:
    """The owner of each `.weight` below `node`: its path below `self`, or None. A module's own `self.weight` is ignored."""
    if isinstance(node, ast.If | ast.IfExp) and _asks_for_training(node.test):
        for otherwise in node.orelse if isinstance(node.orelse, list) else [node.orelse]:
            yield from _owners(otherwise)
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        path: list[str] = []
        owner: ast.AST = node.value
        while isinstance(owner, ast.Attribute):
            path.insert(0, owner.attr)
            owner = owner.value
        named = isinstance(owner, ast.Name) and owner.id == "self"
        if path or not named:
            yield tuple(path) if named else None
    for child in ast.iter_child_nodes(node):
        yield from _owners(child)


def _asks_for_training(test: ast.expr) -> bool:
    """Whether `test` can only be true in training: `self.training`, or a conjunction with it."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(map(_asks_for_training, test.values))
    return isinstance(test, ast.Attribute) and test.attr == "training"


def _run(
    model: nn.Module, root: nn.Module, stated: dict[str, list[tuple[str, _Read]]]
) -> tuple[set[str], set[tuple[str, _Read]], str | None]:
    """The linears whose weight was read outside their own forward, the places of `stated` that ran, and why the run failed."""
    run: Any = model
    places = {place for reads in stated.values() for place in reads}
    device = next((parameter.device for parameter in model.parameters()), None)
    with (
        torch.no_grad(),
        _in_eval_mode(model),
        run_without_values(model),
        _watched(root) as seen,
        _noted(root, places) as ran,
    ):
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        try:
            run(input_ids=ids, use_cache=False)
        # Model code can raise any exception if it needs values on the meta device.
        except Exception as error:
            return seen, ran, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        with suppress(Exception):
            name = cache_argument(model.forward)
            cache = {name: getattr(run(input_ids=ids, use_cache=True), name)}
            run(input_ids=ids[:, :1], use_cache=True, **cache)
    return seen, ran, None


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Context manager in which `model` is in eval mode: one that is being loaded is not yet, and may read weights only in training."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _noted(root: nn.Module, places: set[tuple[str, _Read]]) -> Iterator[set[tuple[str, _Read]]]:
    """Context manager that collects in the set those of `places` (a module and one of its methods) that run."""
    ran: set[tuple[str, _Read]] = set()
    put: list[tuple[nn.Module, str]] = []

    def noting(place: tuple[str, _Read], method: Any, *args: Any, **kwargs: Any) -> Any:
        ran.add(place)
        return method(*args, **kwargs)

    try:
        for place in places:
            module, name = root.get_submodule(place[0]), place[1].method
            # A subclass may override the method that reads.
            if name not in vars(module) and getattr(type(module), name) is getattr(place[1].kind, name):
                vars(module)[name] = partial(noting, place, getattr(module, name))
                put.append((module, name))
        yield ran
    finally:
        for module, name in put:
            vars(module).pop(name)


@contextmanager
def _watched(root: nn.Module) -> Iterator[set[str]]:
    """Context manager that collects the names of linears whose weight is read by code other than their own forward."""
    seen: set[str] = set()
    kinds = {name: type(module) for name, module in root.named_modules() if isinstance(module, nn.Linear)}
    try:
        for name, kind in kinds.items():
            root.get_submodule(name).__class__ = _watching(kind, name, seen)
        yield seen
    finally:
        for name, kind in kinds.items():
            root.get_submodule(name).__class__ = kind


def _watching(kind: Any, name: str, seen: set[str]) -> Any:
    """A subclass of `kind` that adds `name` to `seen` when its weight is read."""
    inside = False

    class Watching(kind):  # type: ignore[misc]
        @property
        def weight(self) -> Any:
            if not inside:
                seen.add(name)
            return self._parameters["weight"]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside = True
            try:
                return kind.forward(self, *args, **kwargs)
            finally:
                inside = False

    Watching.__name__, Watching.__qualname__ = kind.__name__, kind.__qualname__
    return Watching
