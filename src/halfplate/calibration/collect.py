"""Collecting statistics of the inputs of a decoder layer's linears while the layer runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.statistics import InputStatistics, Statistic

BATCH = 8  # samples that run through a layer at once
# Sums over the tokens are computed in at most this many chunks, on any engine, because rounding depends on the chunks.
CHUNKS = 16


def collect_block(
    blockwise: BlockwiseModel,
    index: int,
    inputs: Sequence[BlockInputs],
    names: Sequence[str],
    statistic: Statistic,
    token_limit: float | None = None,
) -> tuple[dict[str, InputStatistics], list[BlockInputs]]:
    """Run layer `index` on every batch of `inputs`; returns the statistics of the linears `names`, and the outputs of the layer.

    Linears with the same input tensor (q, k and v; gate and up) share one InputStatistics object, collected once. diagonal is
    fp32, gram fp64; `gram` includes the diagonal. The Gram matrix costs one product (d_in, tokens)·(tokens, d_in) per batch;
    batches of some thousand tokens are fastest.

    names: full names of modules of this layer.
    token_limit: the squared norm of each token is clipped to this many times the median of its batch.
    Raises HalfplateError, naming the linear, for inputs that are not finite and for linears that never ran.
    """
    collector = _Collector(statistic, token_limit)
    modules = {name: _module_of_block(blockwise, index, name) for name in names}
    outputs: list[BlockInputs] = []
    with torch.no_grad(), collector.watching(modules):
        for batch in inputs:
            collector.next_batch()
            outputs.append(blockwise.run_block(index, batch))
    return collector.stage.statistics(names), outputs


def input_stages(blockwise: BlockwiseModel, index: int, batch: BlockInputs, names: Sequence[str]) -> list[list[str]]:
    """Group the linears `names` of layer `index` by their shared input, in the order in which `batch` reaches them.

    Linears that `batch` does not reach come last, each in its own group.
    """
    collector = _Collector(Statistic.NONE)
    with torch.no_grad(), collector.watching({name: _module_of_block(blockwise, index, name) for name in names}):
        blockwise.run_block(index, batch)
    stages: dict[str, list[str]] = {}
    leaders = collector.stage.leaders
    for name in [*leaders, *(name for name in names if name not in leaders)]:
        stages.setdefault(leaders.get(name, name), []).append(name)
    return list(stages.values())


@torch.no_grad()
def head_gram(blockwise: BlockwiseModel, states: Sequence[BlockInputs]) -> Tensor:
    """The Gram matrix XᵀX / tokens, fp64 (hidden, hidden), of the inputs of the output embedding, from the outputs of the last layer."""
    model: Any = blockwise.model
    head = model.get_output_embeddings()
    width, count = head.weight.shape[1], 0
    gram = torch.zeros(width, width, dtype=torch.float64, device=states[0].hidden.device)

    def collect(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal gram, count
        inputs = args[0].reshape(-1, width).double()
        gram, count = gram + inputs.T @ inputs, count + len(inputs)
        raise _Seen

    hook = head.register_forward_pre_hook(collect)
    try:
        for state in states:
            with suppress(_Seen):
                blockwise.finish(state)
    finally:
        hook.remove()
    return gram / count


class _Seen(Exception):
    """Raised after the inputs of the head are recorded: its product is not needed."""


@torch.no_grad()
def recorded_inputs(
    blockwise: BlockwiseModel, index: int, batch: BlockInputs, names: Sequence[str]
) -> tuple[dict[str, Tensor], BlockInputs]:
    """Run layer `index` once; returns the inputs of the linears `names`, fp32 in their shape, and the outputs of the layer."""
    found: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if name not in found or bool(
            x.any()
        ):  # a second call with zeros, such as for a token before the first, says nothing
            found[name] = x.float()

    hooks = [
        _module_of_block(blockwise, index, name).register_forward_pre_hook(partial(record, name), with_kwargs=True)
        for name in names
    ]
    try:
        return found, blockwise.run_block(index, batch)
    finally:
        for hook in hooks:
            hook.remove()


def stage_sums(
    blockwise: BlockwiseModel,
    index: int,
    inputs: Sequence[BlockInputs],
    names: Sequence[str],
    statistic: Statistic,
    dense: Sequence[Tensor] | None = None,
    token_limit: float | None = None,
    during: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext(),
) -> "StageSums":
    """Sums over the inputs of the linears `names`, one of `input_stages`, in the current layer `index`, which runs only as far as needed.

    The sums of further batches may be added before statistics are computed.

    inputs: inputs of the layer, from the compressed layers before it.
    dense: the input of these linears in the original model for each of `inputs`; if given, cross moments are collected (from
        Statistic.GRAM on).
    token_limit: as in `collect_block`.
    during: a context in which the layer runs on the batch of this number.
    """
    collector = _Collector(statistic, token_limit)
    modules = {name: _module_of_block(blockwise, index, name) for name in names}
    for number, batch in enumerate(inputs):
        collector.next_batch(None if dense is None else dense[number])
        with during(number):
            _run_to(blockwise, index, batch, collector, modules)
        leaders = set(collector.stage.leaders.values())
        if len(leaders) == 1:  # the others share its input, so later batches need not run them
            modules = {name: module for name, module in modules.items() if name in leaders}
    return collector.stage


class _Reached(Exception):
    """Raised once every requested linear has received its input."""


def _run_to(
    blockwise: BlockwiseModel,
    index: int,
    batch: BlockInputs,
    collector: "_Collector",
    modules: dict[str, nn.Module],
) -> None:
    """Run a layer on `batch` until all of `modules` have been called."""
    left = set(modules)

    def reached(name: str, *_: Any) -> None:
        left.discard(name)
        if not left:
            raise _Reached

    with torch.no_grad(), collector.watching(modules):
        hooks = [module.register_forward_pre_hook(partial(reached, name)) for name, module in modules.items()]
        try:
            blockwise.run_block(index, batch)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class Sums:
    """Sums over tokens: squares fp64 (d_in,), products and crosses (d_in, d_in), fp32 within a batch and then fp64."""

    tokens: int = 0
    squares: Tensor | None = None
    products: Tensor | None = None
    crosses: Tensor | None = None

    def add(
        self,
        x: Tensor,
        statistic: Statistic,
        dense: Tensor | None,
        token_limit: float | None = None,
        factors: Tensor | None = None,
    ) -> None:
        """Add x fp32 (tokens, d_in), and its products with `dense`, the corresponding inputs in the original model.

        token_limit: the squared norm of each token is clipped to this many times the median; zero tokens do not count for the median.
        factors: fp32 (tokens,) by which tokens are then multiplied; the mean of their squares over all tokens that are added is 1.
        """
        self.tokens += len(x)
        if statistic == Statistic.NONE:
            return  # x may be empty
        with torch.autocast(x.device.type, enabled=False):
            self._add(x, statistic, dense, token_limit, factors)

    def _add(
        self,
        x: Tensor,
        statistic: Statistic,
        dense: Tensor | None,
        token_limit: float | None,
        factors: Tensor | None,
    ) -> None:
        if token_limit is not None:
            energy = x.square().sum(1, keepdim=True)
            living = energy[energy > 0]
            limit = token_limit * living.median() if len(living) else energy.new_tensor(torch.inf)
            factor = torch.where(energy > limit, (limit / energy).sqrt(), 1.0)
            x = x * factor
            dense = None if dense is None else dense * factor
        if factors is not None:
            x = x * factors[:, None]
            dense = None if dense is None else dense * factors[:, None]
        squares = x.square().sum(0, dtype=torch.float64)
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        if statistic >= Statistic.GRAM:
            # fp32 is 2 to 30 times faster than fp64 and accurate enough within a batch, but not between batches: single
            # activations are huge (29,000 in SmolLM2, squared 8e8), and an fp32 sum with one of them loses the contributions
            # of ordinary tokens.
            self.products = _added(self.products, x.T @ x)
            if dense is not None:
                self.crosses = _added(self.crosses, dense.T @ x)

    def merge(self, later: "Sums") -> None:
        """Add the sums of later tokens, which are consumed. Adding chunks in order gives the same result on any engine."""
        self.tokens += later.tokens
        for name in ("squares", "products", "crosses"):
            more = getattr(later, name)
            if more is not None:
                setattr(self, name, _added(getattr(self, name), more))

    def statistics(self) -> InputStatistics:
        """The means; the sums are consumed."""
        diagonal = None if self.squares is None else (self.squares / self.tokens).float()
        gram = None if self.products is None else self.products.double().div_(self.tokens)
        cross = None if self.crosses is None else self.crosses.double().div_(self.tokens)
        return InputStatistics(self.tokens, diagonal, gram, cross)


def _added(before: Tensor | None, more: Tensor) -> Tensor:
    """The sum in fp64, in the memory of `before` if that is fp64; `more` itself if there is no `before`."""
    return more if before is None else before.double().add_(more)


@dataclass
class StageSums:
    """Sums of every distinct input under the name of the first linear that uses it (its leader), and the leader of each linear."""

    leaders: dict[str, str] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)

    def lead(self, name: str, leader: str) -> None:
        """Record that `leader` has the same input as `name`; raises HalfplateError if it had a different one before."""
        if (before := self.leaders.setdefault(name, leader)) != leader:
            other = before if leader == name else leader
            raise HalfplateError(
                f"{name} shares its input with {other} in some batches and not in others, so its statistics cannot be "
                "collected; exclude it"
            )

    def merge(self, later: "StageSums") -> None:
        """Add the sums of later batches."""
        for name, leader in later.leaders.items():
            self.lead(name, leader)
        for leader, sums in later.sums.items():
            self.sums.setdefault(leader, Sums()).merge(sums)

    def renamed(self, names: Mapping[str, str]) -> "StageSums":
        """The same sums for linears of other names, by the old ones."""
        leaders = {names[name]: names[leader] for name, leader in self.leaders.items()}
        return StageSums(leaders, {names[leader]: sums for leader, sums in self.sums.items()})

    def statistics(self, names: Sequence[str]) -> dict[str, InputStatistics]:
        """The statistics of the linears `names`; those with the same input share one object. The sums are consumed."""
        for name in names:
            if name not in self.leaders:
                raise HalfplateError(
                    f"{name} never ran on the calibration tokens, so it has no input statistics; "
                    "raise samples, or exclude it"
                )
        found = {leader: sums.statistics() for leader, sums in self.sums.items()}
        return {name: found[self.leaders[name]] for name in names}


class _Collector:
    """Sums for every distinct input, under the name of the first linear that uses it (its leader)."""

    def __init__(self, statistic: Statistic, token_limit: float | None = None) -> None:
        self.statistic, self.token_limit = statistic, token_limit
        self.stage = StageSums()
        # The tensor is kept with its leader, so that its id is not reused while the batch runs.
        self._seen: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self._dense: Tensor | None = None  # the same input in the original model, for this batch

    def next_batch(self, dense: Tensor | None = None) -> None:
        self._dense = None if dense is None else dense.reshape(-1, dense.shape[-1])
        self._seen.clear()

    @contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Context manager in which every call of one of `modules` adds its input."""
        hooks = [
            module.register_forward_pre_hook(partial(self._add, name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()

    def _add(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        # The version counts in-place changes, after which the tensor is a different input.
        key = (id(x), x._version)
        leader = self._seen[key][0] if key in self._seen else name
        if self.stage.leaders.get(name, leader) != leader and not bool(x.any()):
            return  # a second call with zeros, such as for a token before the first, says nothing
        self.stage.lead(name, leader)
        if key in self._seen:
            return
        self._seen[key] = (name, x)
        rows = x.reshape(-1, x.shape[-1]).float()
        sums = self.stage.sums.setdefault(name, Sums())
        sums.add(rows, self.statistic, self._dense, self.token_limit)
        if sums.squares is not None and not bool(torch.isfinite(sums.squares).all()):
            broken = int((~torch.isfinite(sums.squares)).sum())
            raise HalfplateError(
                f"{name}: {broken} of its {x.shape[-1]} inputs are not finite on the calibration tokens; "
                "check that the original model works on this text, or pass another"
            )


def _module_of_block(blockwise: BlockwiseModel, index: int, name: str) -> nn.Module:
    """The module with the full name `name`, which must be in layer `index`."""
    prefix = f"{blockwise.prefix}.{index}."
    try:
        if not name.startswith(prefix):
            raise AttributeError
        return blockwise.blocks[index].get_submodule(name.removeprefix(prefix))
    except AttributeError:
        raise HalfplateError(
            f"{name!r} is not a module of layer {index}; expected a name such as {prefix}..."
        ) from None
