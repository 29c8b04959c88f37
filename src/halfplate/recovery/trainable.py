"""A compressed linear whose numbers can be trained while its mask stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats import BlockDiagonal, CompressedLinear, LowRank
from halfplate.formats.chain import Chain, unpermuted
from halfplate.formats.nm_sparse import Grid
from halfplate.formats.plain import WeightView
from halfplate.formats.quantizers import has_scales_alone
from halfplate.formats.rounding import round_to_float


class TrainableLinear(nn.Module):
    """y = x (A S B + L R)ᵀ + bias with fp32 parameters in place of the stored tensors of a CompressedLinear.

        out_blocks, out_tail, in_blocks, in_tail: the wrappers that there are; left, right: the low-rank part, if any. values: the kept values (d_out, kept), or the
        scales (d_out, ceil(d_in / group)) where they lie on a grid, whose codes stay. Positions and the order of inputs are no parameters, so the mask is
    fixed by construction. values_too: whether `values` asks for a gradient. A shared input wrapper is a parameter of the
    linear that stores it alone; the others find it through their `lender`.
    """

    columns: Tensor
    integers: Tensor | None
    left: nn.Parameter | None
    right: nn.Parameter
    lender: "TrainableLinear | None"

    def __init__(self, linear: CompressedLinear, values_too: bool) -> None:
        super().__init__()
        self.spec, self.start, self.dtype = linear.spec, linear.matrix, linear.dtype
        self.lend(None)
        core = self.start.core
        self.values = nn.Parameter((core.stored if core.grid is None else _scales(core.grid)).float(), values_too)
        self.register_buffer("columns", core.columns(), persistent=False)
        self.register_buffer("integers", None if core.grid is None else core.integers(), persistent=False)
        for side, wrapper in (("out", self.start.out_wrapper), ("in", self.start.in_wrapper)):
            borrowed = side == "in" and self.spec.in_shared is not None
            parts = (None, None) if wrapper is None or borrowed else wrapper.floats(torch.float32)
            for name, part in zip(("blocks", "tail"), parts, strict=True):
                self.register_parameter(f"{side}_{name}", None if part is None else nn.Parameter(part.clone()))
        added = self.start.added
        for name, part in (
            ("left", None if added is None else added.left),
            ("right", None if added is None else added.right),
        ):
            self.register_parameter(name, None if part is None else nn.Parameter(part.detach().float().clone()))
        self.bias = linear.bias

    def lend(self, lender: "TrainableLinear | None") -> None:
        """Make `lender` the linear whose input wrapper this one applies."""
        # Not as a submodule: a shared wrapper is one parameter, not one for each that applies it.
        object.__setattr__(self, "lender", lender)

    @property
    def leverage(self) -> float:
        """How far a weight moves with a step of `values`, as a root mean square: that of the codes where these are scales."""
        if self.integers is None:
            return 1.0
        grid = self.start.core.grid
        assert grid is not None, "codes have a quantizer"
        moved = grid.quantizer.decode(self.integers, torch.ones((), dtype=torch.float32, device=self.integers.device))
        return max(1.0, float(moved.square().mean().sqrt()))

    @property
    def weight(self) -> WeightView:
        """What the code of a model may ask of it: dtype, device and shape; its values raise a HalfplateError."""
        return WeightView((self.spec.d_out, self.spec.d_in), self.dtype, self.values.device)

    def dense(self) -> Tensor:
        """A S B as it stands, with its graph, in fp32 even under autocast: (d_out, d_in)."""
        with torch.autocast(self.values.device.type, enabled=False):
            return self._assembled()

    def _assembled(self) -> Tensor:
        values: Tensor = self.values
        if self.integers is not None:
            # A scale that training takes past 0 comes back on the positive side, the only one that is stored.
            grid = self.start.core.grid
            assert grid is not None, "codes have a quantizer"
            values = grid.quantizer.decode(self.integers, values.abs().gather(1, self.columns // self.spec.group))
        matrix = values.new_zeros(self.spec.d_out, self.spec.d_in).scatter(1, self.columns, values)
        if (out_wrapper := self._wrapper("out")) is not None:
            matrix = out_wrapper.forward(matrix.T).T
        if (in_wrapper := self._wrapper("in")) is not None:
            matrix = in_wrapper.transposed(torch.float32).forward(matrix)
        if self.left is not None:
            matrix = matrix + self.left @ self.right
        permutation = self.start.permutation
        return matrix if permutation is None else unpermuted(matrix, permutation)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out). One product with the assembled matrix is cheapest for many tokens."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dense().to(x.dtype), bias)

    @torch.no_grad()
    def compressed(self) -> CompressedLinear:
        """The linear in its stored types; raises HalfplateError where a number has left the range of its type."""
        core = self.start.core
        if core.grid is None:
            core = replace(core, stored=round_to_float(self.values, self.spec.core_dtype, "core_dtype"))
        else:
            scales = round_to_float(self.values.abs(), "fp16", "core_dtype")
            core = replace(core, grid=replace(core.grid, parameters=(scales,)))
        out_wrapper, in_wrapper = (
            None if wrapper is None else BlockDiagonal.rounded(wrapper.blocks, wrapper.tail, self.spec.wrapper_dtype)
            for wrapper in (self._wrapper("out"), self._wrapper("in"))
        )
        added = None
        if self.left is not None:
            added = LowRank.rounded(self.left, self.right, self.spec.wrapper_dtype)
        matrix = Chain(self.spec, core, out_wrapper, in_wrapper, added, self.start.permutation)
        assert torch.equal(matrix.core.mask(), self.start.core.mask()), "tuning must not move the mask"
        linear = CompressedLinear.from_weight(matrix, self.spec, self.bias)
        linear.dtype = self.dtype
        return linear

    def _wrapper(self, side: str) -> BlockDiagonal | None:
        owner = self if side == "out" or self.lender is None else self.lender
        blocks, tail = getattr(owner, f"{side}_blocks"), getattr(owner, f"{side}_tail")
        return None if blocks is None and tail is None else BlockDiagonal(blocks, tail)


def _scales(grid: Grid) -> Tensor:
    if not has_scales_alone(grid.quantizer):
        raise HalfplateError(
            f"core_dtype={grid.quantizer.name!r} stores {' and '.join(grid.quantizer.stored)}, expected scales alone; only those can be trained"
        )
    return grid.parameters[0]


@contextmanager
def trainable(module: nn.Module, values_too: bool) -> Iterator[dict[str, TrainableLinear]]:
    """While inside, every CompressedLinear below `module` is a TrainableLinear; afterwards it is compressed again.

    Yields them by name. An exception puts the linears back as they were.
    """
    before = {name: part for name, part in module.named_modules() if isinstance(part, CompressedLinear)}
    inside = {name: TrainableLinear(linear, values_too) for name, linear in before.items()}
    lenders = _lenders(before)
    for name, lender in lenders.items():
        inside[name].lend(inside[lender])
    after: dict[str, CompressedLinear] = before
    try:
        for name, linear in inside.items():
            module.set_submodule(name, linear)
        yield inside
        tuned = {name: linear.compressed() for name, linear in inside.items()}
        for name, lender in lenders.items():
            tuned[name].lend(tuned[lender])
        after = tuned
    finally:
        for name, done in after.items():
            module.set_submodule(name, done)


def _lenders(linears: dict[str, CompressedLinear]) -> dict[str, str]:
    """The name of the linear that stores the input wrapper, for each that shares it; both are among `linears`."""
    names = {linear: name for name, linear in linears.items()}
    lenders = {name: linear.lender for name, linear in linears.items() if linear.lender is not None}
    for name, lender in lenders.items():
        if lender not in names:
            raise HalfplateError(
                f"{name} shares the input wrapper of a module outside of what is trained; train both together"
            )
    return {name: names[lender] for name, lender in lenders.items()}
