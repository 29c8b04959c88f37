"""Running a model one decoder layer at a time, with exactly the results of its own forward pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from halfplate.errors import HalfplateError
from halfplate.models.handover import (
    BlockArguments,
    Carried,
    FromBlock,
    call_arguments,
    carried_on,
    copied,
    filled,
    with_handed_on,
)
from halfplate.models.linears import find_blocks
from halfplate.precision import products

# What model code raises for inputs that it does not support, such as a text of this length.
FAILURES = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


@dataclass
class BlockInputs:
    """The inputs of the next layer.

    hidden: (samples, L, d) in most models; others have an additional dimension, before or after the samples.
    arguments: the other arguments of each layer (masks, rotary embeddings, positions), by layer index.
    carried: other values that earlier layers pass on (shared keys and values, the state of a router).
    text: (samples, L) of the tokens, if `hidden` does not begin with it.
    """

    hidden: Tensor
    arguments: Sequence[BlockArguments] | Mapping[int, BlockArguments]
    carried: Carried = field(default_factory=dict)
    text: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, L) of the tokens."""
        samples, length = self.hidden.shape[:2] if self.text is None else self.text
        return samples, length

    @property
    def all_arguments(self) -> list[BlockArguments]:
        """The arguments of all layers in order, as `embed` returns them."""
        return [self.arguments[block] for block in range(len(self.arguments))]

    def split(self, size: int) -> list["BlockInputs"]:
        """The same samples in parts of at most `size` samples; `hidden` must begin with the samples."""
        samples, length = self.shape

        def cut(part: Tensor, first: int) -> Tensor:
            # Some layers pass on one row per token.
            if part.ndim == 2 and len(part) == samples * length != samples:
                return part[first * length : (first + size) * length]
            # A square L × L tensor has no sample dimension, even if L equals the number of samples.
            each = part.ndim > 1 and len(part) == samples and (part.ndim > 2 or samples != length)
            return part[first : first + size] if each else part

        def at(first: int) -> "BlockInputs":
            hidden = self.hidden[first : first + size]
            arguments, carried = tree_map_only(Tensor, lambda part: cut(part, first), (self.arguments, self.carried))
            return BlockInputs(hidden, arguments, carried, (len(hidden), length))

        return [at(first) for first in range(0, samples, size)]


class BlockwiseModel:
    """A causal language model as embedding, decoder layers and head, which can run separately.

    The model's own forward pass makes masks and positions, so local attention, per-layer rotary embeddings and the like need
    no code here. `embed`, `run_block` for every layer in order, and `finish` give the logits of the whole forward pass, bit
    for bit. If modules inside the layers are replaced, the new ones run.

    precision: of the matrix products in `run_block`, a value of `halfplate.precision`.
    Raises HalfplateError if no layers are found, or if the model changes the hidden state between two layers.
    """

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        self.model, self.precision = model, precision
        self.prefix, self.blocks = find_blocks(model)
        # How layers of a class return further values besides the hidden state; None if they return only that.
        self._returned: dict[type[nn.Module], TreeSpec | None] = {}
        # Further outputs of the first layer of each class, while the arguments are collected.
        self._tried: dict[type[nn.Module], list[Any]] = {}

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> BlockInputs:
        """The input of the first layer for `input_ids` int64 (samples, L), with the arguments of every layer."""
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: Tensor | None = None
        previous: Tensor | None = None

        def record(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal first, previous
            hidden, rest = self._split_hidden(args, kwargs)
            if index != len(recorded) or (previous is not None and not _same_memory(hidden, previous)):
                raise HalfplateError(
                    f"model {self._class} changes the hidden state between its layers or does not run "
                    "them in order, so it cannot be run layer by layer; use a method that needs no text (magnitude, rtn), or a model with a plain chain "
                    "of decoder layers"
                )
            first = hidden if first is None else first
            recorded.append(copied(rest))
            # A copy, so that a hidden state from elsewhere cannot pass the test above.
            previous = hidden.clone()
            return self._as_returned(index, previous, forward, args, kwargs)

        # Without the head: the logits of a batch can be larger than everything else.
        body = getattr(self.model, "base_model", self.model)
        with self._blocks_replaced(record):
            try:
                body(input_ids=input_ids, use_cache=False)
            except FAILURES as error:
                # Model code that computes with the output of a layer would see a FromBlock.
                raise HalfplateError(self._apart("it fails without its layers", error)) from error
            finally:
                self._tried.clear()
        if first is None or len(recorded) != len(self.blocks):
            raise HalfplateError(
                f"model {self._class} ran {len(recorded)} of the {len(self.blocks)} layers under "
                f"{self.prefix!r}, so it cannot be run layer by layer; use a method that needs no text (magnitude, rtn), or a model with a plain "
                "chain of decoder layers"
            )
        return BlockInputs(first, with_handed_on(recorded), text=(input_ids.shape[0], input_ids.shape[1]))

    def run_block(self, index: int, inputs: BlockInputs, block: nn.Module | None = None) -> BlockInputs:
        """The input of layer `index + 1` from that of layer `index`; `hidden` keeps its shape.

        block: another module to run instead of the layer.
        """
        arguments = inputs.arguments[index]
        args, kwargs = called = call_arguments(arguments, inputs.carried)
        with products(self.precision, inputs.hidden.device.type):
            try:
                output = (self.blocks[index] if block is None else block)(inputs.hidden, *args, **kwargs)
            except FAILURES as error:
                raise HalfplateError(self._apart(f"layer {index} fails for these tokens", error)) from error
        hidden, *others = output if isinstance(output, tuple | list) else (output,)
        carried = carried_on(index, arguments, called, others, inputs.carried)
        return BlockInputs(hidden.to(inputs.hidden.dtype), inputs.arguments, carried, inputs.text)

    @torch.no_grad()
    def run_whole(self, input_ids: Tensor, seen: Callable[[int, Tensor], None]) -> None:
        """The model's own forward pass without its head, in the precision of `run_block`.

        seen: called with the index and the input of each layer, and with the number of layers and the output of the last one.
        """

        def watch(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden, _ = self._split_hidden(args, kwargs)
            seen(index, hidden)
            with products(self.precision, hidden.device.type):
                output = forward(*args, **kwargs)
            own, *others = output if isinstance(output, tuple | list) else (output,)
            own = own.to(hidden.dtype)
            if index == len(self.blocks) - 1:
                seen(index + 1, own)
            return (own, *others) if isinstance(output, tuple | list) else own

        with self._blocks_replaced(watch):
            getattr(self.model, "base_model", self.model)(input_ids=input_ids, use_cache=False)

    @torch.no_grad()
    def finish(self, inputs: BlockInputs) -> Tensor:
        """Logits (samples, L, vocabulary) from the output of the last layer."""

        def skip(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden = inputs.hidden if index == len(self.blocks) - 1 else self._split_hidden(args, kwargs)[0]
            return self._as_returned(index, hidden, forward, args, kwargs)

        # The tokens do not matter: the last layer always returns `inputs.hidden`.
        ids = torch.zeros(inputs.shape, dtype=torch.int64, device=inputs.hidden.device)
        with self._blocks_replaced(skip):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        self._tried.clear()
        return logits

    @torch.no_grad()
    def logits(self, input_ids: Tensor, run: Callable[..., Any]) -> Tensor:
        """Logits (samples, L, vocabulary) of the model's own forward pass, in which run(index, *args, **kwargs) is called instead of each layer."""

        def instead(index: int, _: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return run(index, *args, **kwargs)

        with self._blocks_replaced(instead):
            found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found

    def unknown_blocks(self) -> list[int]:
        """The first layer of each class that has not run yet. `embed` runs it once to see the form of its output."""
        first = {type(block): index for index, block in reversed(list(enumerate(self.blocks)))}
        return [index for kind, index in first.items() if kind not in self._returned]

    @property
    def _class(self) -> str:
        return type(self.model).__name__

    def _apart(self, what: str, error: Exception) -> str:
        reason = " ".join(str(error).split())
        return (
            f"model {self._class} cannot be run layer by layer: {what} ({type(error).__name__}: {reason[:200]}); use a method that needs "
            "no text (magnitude, rtn), or a model with a plain chain of decoder layers"
        )

    def _as_returned(
        self,
        index: int,
        hidden: Tensor,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`hidden` in the form in which layer `index` returns it. A layer of an unknown class runs once to find this form."""
        kind = type(self.blocks[index])
        if kind not in self._returned:
            args, kwargs = filled((args, kwargs), lambda at: self._tried[type(self.blocks[at.block])][at.leaf])
            try:
                output = forward(*args, **kwargs)
            except FAILURES as error:
                raise HalfplateError(self._apart(f"layer {index} fails when it is run alone", error)) from error
            self._tried[kind], spec = tree_flatten(list(output[1:]) if isinstance(output, tuple | list) else [])
            self._returned[kind] = spec if isinstance(output, tuple | list) else None
        returned = self._returned[kind]
        if returned is None:
            return hidden
        return (hidden, *tree_unflatten([FromBlock(index, leaf) for leaf in range(returned.num_leaves)], returned))

    def _split_hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, Any]]:
        """The hidden state, which is the first argument or has its name, and the other arguments of a layer."""
        if args:
            return args[0], (args[1:], kwargs)
        if "hidden_states" not in kwargs:
            raise HalfplateError(
                f"model {self._class} calls its layers with {', '.join(kwargs)}, expected the hidden state first or as hidden_states; "
                "use a method that needs no text (magnitude, rtn)"
            )
        return kwargs["hidden_states"], ((), {name: value for name, value in kwargs.items() if name != "hidden_states"})

    @contextmanager
    def _blocks_replaced(self, instead: Callable[..., Any]) -> Iterator[None]:
        """Context manager in which layer i calls `instead(i, its own forward, *args, **kwargs)`."""
        own = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                block.forward = _Replacement(instead, index, block.forward)
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward


@dataclass(frozen=True)
class _Replacement:
    instead: Callable[..., Any]
    index: int
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.instead(self.index, self.forward, *args, **kwargs)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same values at the same address, such as a tensor and a full slice of it."""
    place = [(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in (a, b)]
    return a is b or place[0] == place[1]
