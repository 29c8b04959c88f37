"""Running a model one decoder block at a time, exactly as its own forward does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from halfplate.errors import HalfplateError
from halfplate.models.linears import find_blocks
from halfplate.precision import products

# Positional and keyword arguments of one block, without the hidden state.
BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class BlockInputs:
    """What the next block is called with.

    hidden: (samples, L, d). arguments: by the index of a block, its other arguments (masks, rotary embeddings, positions);
    they depend on the shape (samples, L) alone, so batches of one shape may share them.
    """

    hidden: Tensor
    arguments: Sequence[BlockArguments] | Mapping[int, BlockArguments]

    def split(self, size: int) -> list["BlockInputs"]:
        """The same samples, at most `size` at a time."""
        samples, length = self.hidden.shape[:2]

        def cut(part: Tensor, first: int) -> Tensor:
            # A square of length by length has no samples, though their number may be the same.
            each = part.ndim > 1 and len(part) == samples and (part.ndim > 2 or samples != length)
            return part[first : first + size] if each else part

        return [
            BlockInputs(part, tree_map_only(Tensor, partial(cut, first=number * size), self.arguments))
            for number, part in enumerate(self.hidden.split(size))
        ]


class BlockwiseModel:
    """A causal language model as embedding, decoder blocks and head, which can be run apart.

    The model's own forward makes masks and positions, so local attention, per-layer rope and the like need no
    knowledge here. `embed`, `run_block` for every block in order, and `finish` give the logits of the whole forward,
    bit for bit. Modules replaced inside the blocks are used from then on. precision: of the products in `run_block`, one of
    `halfplate.precision`. Raises HalfplateError if no blocks are found, or if the model changes the hidden state between two
    blocks.
    """

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        self.model, self.precision = model, precision
        self.prefix, self.blocks = find_blocks(model)
        # Length of the tuple that blocks of a class return, 0 where they return the hidden state itself.
        self._returned: dict[type[nn.Module], int] = {}

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> BlockInputs:
        """The input of the first block for `input_ids` int64 (samples, L), and the arguments of every block."""
        arguments: list[BlockArguments] = []
        first: Tensor | None = None
        previous: Tensor | None = None

        def record(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal first, previous
            hidden, rest = _split_hidden(args, kwargs)
            if index != len(arguments) or (previous is not None and hidden is not previous):
                raise HalfplateError(
                    f"model {type(self.model).__name__} changes the hidden state between its blocks or does not run "
                    "them in order, so it cannot be run block by block; use a model with a plain chain of decoder blocks"
                )
            first = hidden if first is None else first
            arguments.append(rest)
            # A copy, so that the identity test above cannot be met by a hidden state that came from elsewhere.
            previous = hidden.view_as(hidden)
            return self._as_returned(self.blocks[index], previous, forward, args, kwargs)

        # Without the head, whose logits of a whole batch can be larger than everything else.
        body = getattr(self.model, "base_model", self.model)
        with self._blocks_replaced(record):
            body(input_ids=input_ids, use_cache=False)
        if first is None or len(arguments) != len(self.blocks):
            raise HalfplateError(
                f"model {type(self.model).__name__} ran {len(arguments)} of the {len(self.blocks)} blocks under "
                f"{self.prefix!r}, so it cannot be run block by block; use a model with a plain chain of decoder blocks"
            )
        return BlockInputs(first, arguments)

    def run_block(self, index: int, inputs: BlockInputs, block: nn.Module | None = None) -> BlockInputs:
        """The input of block `index + 1` from that of block `index`; hidden keeps its shape (samples, L, d).

        block: another module to run in its place.
        """
        args, kwargs = inputs.arguments[index]
        with products(self.precision, inputs.hidden.device.type):
            output = (self.blocks[index] if block is None else block)(inputs.hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return BlockInputs(hidden.to(inputs.hidden.dtype), inputs.arguments)

    @torch.no_grad()
    def finish(self, inputs: BlockInputs) -> Tensor:
        """Logits (samples, L, vocabulary) from the output of the last block."""

        def skip(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden = inputs.hidden if index == len(self.blocks) - 1 else _split_hidden(args, kwargs)[0]
            return self._as_returned(self.blocks[index], hidden, forward, args, kwargs)

        # The tokens do not matter: the last block hands out `inputs.hidden` in any case.
        ids = torch.zeros(inputs.hidden.shape[:2], dtype=torch.int64, device=inputs.hidden.device)
        with self._blocks_replaced(skip):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _as_returned(
        self,
        block: nn.Module,
        hidden: Tensor,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`hidden` in the form that `block` returns it; blocks of a class that is not yet known run once to see it."""
        kind = type(block)
        if kind not in self._returned:
            output = forward(*args, **kwargs)
            self._returned[kind] = len(output) if isinstance(output, tuple) else 0
        length = self._returned[kind]
        return (hidden, *(None,) * (length - 1)) if length else hidden

    @contextmanager
    def _blocks_replaced(self, instead: Callable[..., Any]) -> Iterator[None]:
        """While inside, block i calls `instead(i, its own forward, *args, **kwargs)`."""
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


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockArguments]:
    """The hidden state, which comes first or by its name, and the other arguments of a block."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {name: value for name, value in kwargs.items() if name != "hidden_states"})
