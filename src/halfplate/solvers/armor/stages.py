"""The three stages of an exact iteration: moments for A, moments for B, and the sweep over the core.

Each has a native version and a torch version. The torch version runs on any device and is the reference in tests.
"""

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfplate.kernels import native
from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.sweep import sweep_tiles


@dataclass(frozen=True, eq=False)
class Moments:
    """Right and left side of the normal equations of one wrapper, and the current loss.

    cross, square: fp64 (tiles, b, b).
    tile_losses: fp64 (row_tiles, col_tiles).
    """

    cross: Tensor
    square: Tensor
    tile_losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.tile_losses.sum())


class Stages(Protocol):
    """The interface of an implementation of the stages."""

    def output_moments(self, problem: Problem, factors: Factors) -> Moments:
        """For A: R D Zᵀ and Z D Zᵀ summed over the columns, with Z = S B and R = W − A Z."""

    def input_moments(self, problem: Problem, factors: Factors) -> Moments:
        """For B: Tᵀ R and Tᵀ T summed over the rows, with T = A S and R = W − T B."""

    def sweep(self, problem: Problem, factors: Factors) -> float:
        """Give every group of S in turn its best mask and values, in place; returns the loss before it."""


def stages_for(device: torch.device) -> Stages:
    """The native stages on a CPU that supports them, otherwise the torch stages."""
    return NativeStages() if device.type == "cpu" and native.available() else TorchStages()


class TorchStages:
    """The stages in torch operations, batched over all tiles."""

    def output_moments(self, problem: Problem, factors: Factors) -> Moments:
        core, weight = _tiles(problem, factors.core), _tiles(problem, problem.weight)
        moment = problem.moment.reshape(problem.col_tiles, 1, problem.col_tile)
        right = core @ factors.in_blocks  # Z: (row_tiles, col_tiles, row_tile, col_tile)
        residual = weight - factors.out_blocks[:, None] @ right
        cross = (residual * moment) @ right.transpose(2, 3)
        square = (right * moment) @ right.transpose(2, 3)
        return Moments(cross.double().sum(1), square.double().sum(1), _tile_losses(residual, moment))

    def input_moments(self, problem: Problem, factors: Factors) -> Moments:
        core, weight = _tiles(problem, factors.core), _tiles(problem, problem.weight)
        moment = problem.moment.reshape(problem.col_tiles, 1, problem.col_tile)
        left = factors.out_blocks[:, None] @ core  # T: (row_tiles, col_tiles, row_tile, col_tile)
        residual = weight - left @ factors.in_blocks
        cross, square = left.transpose(2, 3) @ residual, left.transpose(2, 3) @ left
        return Moments(cross.double().sum(0), square.double().sum(0), _tile_losses(residual, moment))

    def sweep(self, problem: Problem, factors: Factors) -> float:
        core, weight = _tiles(problem, factors.core), _tiles(problem, problem.weight)
        moment = problem.moment.reshape(problem.col_tiles, 1, problem.col_tile)
        residual = weight - factors.out_blocks[:, None] @ (core @ factors.in_blocks)
        error = factors.out_blocks.transpose(1, 2)[:, None] @ (residual * moment) @ factors.in_blocks.transpose(1, 2)
        out_gram = factors.out_blocks.transpose(1, 2) @ factors.out_blocks
        in_gram = (factors.in_blocks * moment) @ factors.in_blocks.transpose(1, 2)
        shape = core.shape  # (row_tiles, col_tiles, row_tile, col_tile)
        swept = sweep_tiles(
            core.reshape(-1, *shape[2:]),
            error.reshape(-1, *shape[2:]),
            out_gram.repeat_interleave(problem.col_tiles, 0),
            in_gram.repeat(problem.row_tiles, 1, 1),
            problem.pattern,
        )
        factors.core.copy_(swept.reshape(shape).transpose(1, 2).reshape(factors.core.shape))
        return float(_tile_losses(residual, moment).sum())


class NativeStages:
    """The stages in C++, on CPU tensors without copies, with as many threads as torch uses."""

    def output_moments(self, problem: Problem, factors: Factors) -> Moments:
        return self._moments("output_moments", problem, factors, problem.row_tiles, problem.row_tile)

    def input_moments(self, problem: Problem, factors: Factors) -> Moments:
        return self._moments("input_moments", problem, factors, problem.col_tiles, problem.col_tile)

    def sweep(self, problem: Problem, factors: Factors) -> float:
        losses = _empty(problem.row_tiles, problem.col_tiles)
        arguments = _native_problem(problem, factors)
        native.check(
            native.library().halfplate_sweep(ctypes.byref(arguments), losses.data_ptr(), losses.nbytes), "sweep"
        )
        return float(losses.sum())

    def _moments(self, stage: str, problem: Problem, factors: Factors, tiles: int, size: int) -> Moments:
        cross, square = _empty(tiles, size, size), _empty(tiles, size, size)
        losses = _empty(problem.row_tiles, problem.col_tiles)
        arguments = _native_problem(problem, factors)
        function = getattr(native.library(), f"halfplate_{stage}")
        status = function(
            ctypes.byref(arguments),
            cross.data_ptr(),
            square.data_ptr(),
            cross.nbytes,
            losses.data_ptr(),
            losses.nbytes,
        )
        native.check(status, stage.replace("_", " "))
        return Moments(cross, square, losses)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="cpu")


def native_buffers(*tensors: Tensor | None) -> tuple[list[int], tuple[int, ...]]:
    """The address and size in bytes of each tensor, both 0 for None; tensors must be fp32, contiguous and on the CPU."""
    addresses = [
        0 if tensor is None else native.address(tensor, torch.float32, "a matrix of the solver") for tensor in tensors
    ]
    return addresses, tuple(0 if tensor is None else tensor.nbytes for tensor in tensors)


def _native_problem(problem: Problem, factors: Factors) -> native.Problem:
    addresses, sizes = native_buffers(
        problem.weight, factors.out_blocks, factors.in_blocks, problem.moment, factors.core
    )
    return native.Problem(
        *addresses,
        problem.row_tiles,
        problem.row_tile,
        problem.col_tiles,
        problem.col_tile,
        problem.pattern.n,
        problem.pattern.m,
        torch.get_num_threads(),
        sizes,
    )


def _tiles(problem: Problem, matrix: Tensor) -> Tensor:
    """(rows, cols) as (row_tiles, col_tiles, row_tile, col_tile); a view."""
    shape = (problem.row_tiles, problem.row_tile, problem.col_tiles, problem.col_tile)
    return matrix.reshape(shape).transpose(1, 2)


def _tile_losses(residual: Tensor, moment: Tensor) -> Tensor:
    return (residual.double().square() * moment).sum((2, 3))
