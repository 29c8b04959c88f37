"""A quantised core without wrappers, for any quantizer whose values are linear in its parameters: minima, and super-scales.

Without wrappers the rows are independent. The rest is as in restarts.py: several starts, each rounded in order with compensation, and
from each a descent over codes and parameters in turn. native_affine.py descends many times faster where it knows the quantizer; here
one column of all rows is rounded at once, on any device.
"""

from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from halfplate.formats.quantizers import Quantizer, has_scales_alone, storage_of
from halfplate.formats.quantizers.rounding import fit_groups
from halfplate.kernels import native
from halfplate.solvers.armor.native_affine import affine_numbers, descend_affine
from halfplate.solvers.armor.restarts import COLUMNS, ROUNDS, Order, round_in_order
from halfplate.solvers.armor.sweep import Levels

RIDGE = 1e-9  # relative to the mean curvature of the parameters of a group


@dataclass(frozen=True, eq=False)
class Rounded:
    """A quantised core.

    values: fp32 (rows, cols).
    parameters: fp32 (rows, groups), one for each name in the quantizer's `stored`; units: as in `Storage`.
    left: the loss of each row, fp64 (rows, 1).
    """

    values: Tensor
    parameters: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    left: Tensor

    def better_of(self, other: "Rounded") -> "Rounded":
        """Of each row the one with less loss."""
        better = other.left < self.left

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better, new, old)

        return Rounded(
            chosen(other.values, self.values),
            tuple(map(chosen, other.parameters, self.parameters)),
            tuple(map(chosen, other.units, self.units)),
            chosen(other.left, self.left),
        )

    def of(self, rows: Tensor) -> "Rounded":
        """Some of the rows."""
        return Rounded(
            self.values[rows],
            tuple(part[rows] for part in self.parameters),
            tuple(part[rows] for part in self.units),
            self.left[rows],
        )

    def replaced(self, rows: Tensor, others: "Rounded") -> "Rounded":
        """With `others` at the places `rows`, int64."""

        def put(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, rows, new)

        return Rounded(
            put(self.values, others.values),
            tuple(map(put, self.parameters, others.parameters)),
            tuple(map(put, self.units, others.units)),
            put(self.left, others.left),
        )


@dataclass(frozen=True, eq=False)
class Descent:
    """Where a descent ended.

    losses: of all rows, absolute: at its start, and after each sweep.
    freely: the parameters that leave least for the codes at the end, whether or not they can be stored, shaped like the others; empty if
        they were not asked for.
    """

    end: Rounded
    losses: list[float]
    freely: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class RowsProblem:
    """Minimise tr((W − Ŵ) C (W − Ŵ)ᵀ) over quantised Ŵ.

    wanted: W, fp32 (rows, cols).
    gram: C, fp32 (cols, cols).
    """

    wanted: Tensor
    gram: Tensor
    levels: Levels

    def solved(self, iterations: int) -> tuple[Rounded, list[float]]:
        """The best point of `ROUNDS` descents, and the losses, absolute: of the first descent, then of the best after each other one.

        iterations: of all descents together.
        """
        order, rounds = Order.of(self.gram), max(1, min(ROUNDS, iterations))
        quantizer = self.levels.quantizer
        _, fitted = fit_groups(self.wanted, quantizer, self.levels.group)
        first = self._descended(order, tuple(part.float() for part in fitted), iterations // rounds, rounds > 1)
        best, losses, freely = first.end, first.losses, first.freely
        rows = torch.arange(len(self.wanted), dtype=torch.int64, device=self.wanted.device)
        for number in range(1, rounds):
            # The parameters of a row that a descent has not improved would give the same start again.
            some = replace(self, wanted=self.wanted[rows])
            found = some._descended(order, freely, iterations // rounds, number + 1 < rounds)
            better = (found.end.left < best.left[rows])[:, 0]
            if not bool(better.any()):
                break
            rows, freely = rows[better], tuple(part[better] for part in found.freely)
            best = best.replaced(rows, found.end.of(better))
            losses.append(self._loss(best))
        return best, losses

    def _descended(self, order: Order, wished: tuple[Tensor, ...], sweeps: int, fits_freely: bool) -> Descent:
        """From rows rounded in order with the nearest storable parameters to `wished`."""
        if self.wanted.device.type == "cpu" and native.available() and affine_numbers(self.levels) is not None:
            return self._native(order, wished, sweeps, fits_freely)
        return self.descended_in_torch(order, wished, sweeps, fits_freely)

    def descended_in_torch(self, order: Order, wished: tuple[Tensor, ...], sweeps: int, fits_freely: bool) -> Descent:
        """The reference of the native descent."""
        at = self._start(order, wished)
        losses = [self._loss(at)]
        for _ in range(sweeps):
            at = at.better_of(self.refitted(self.swept(at)))
            losses.append(self._loss(at))
        return Descent(at, losses, self.refitted(at, storable=False).parameters if fits_freely else ())

    def _native(self, order: Order, wished: tuple[Tensor, ...], sweeps: int, fits_freely: bool) -> Descent:
        units, parameters = self._storable_parameters(wished)
        values, found, freely, losses = descend_affine(
            self.wanted, self.gram, order.columns, order.spread, parameters, units, self.levels, sweeps, fits_freely
        )
        return Descent(
            Rounded(values, found, units, losses[-1][:, None]), [float(part.sum()) for part in losses], freely
        )

    def swept(self, at: Rounded) -> Rounded:
        """Every column in turn at the best codes for the others, with the parameters as they are."""
        cols, strength = len(self.gram), self.gram.diagonal()
        error = self.gram @ (self.wanted - at.values).T  # (cols, rows): a column is contiguous
        values, each = at.values.T.contiguous(), [part.T.contiguous() for part in self._each(at.parameters)]
        quantizer = self.levels.quantizer
        alive = (strength > 0).tolist()
        for start in range(0, cols, COLUMNS):
            end = min(start + COLUMNS, cols)
            moved = torch.zeros_like(values[start:end])
            for j in range(start, end):
                if not alive[j]:
                    continue
                here = [part[j] for part in each]
                found = quantizer.decode(quantizer.nearest(values[j] + error[j] / strength[j], *here), *here)
                moved[j - start] = found - values[j]
                values[j] = found
                error[j + 1 : end].addr_(self.gram[j, j + 1 : end], moved[j - start], alpha=-1)
            error[end:].addmm_(self.gram[end:, start:end], moved, alpha=-1)
        return self._at(replace(at, values=values.T.contiguous()))

    def refitted(self, at: Rounded, storable: bool = True) -> Rounded:
        """The parameters of each group in turn at their best for the codes. storable: whether only those that can be stored are taken."""
        quantizer, group = self.levels.quantizer, self.levels.group
        values, parameters = at.values.clone(), [part.clone() for part in at.parameters]
        codes = quantizer.nearest(values, *self._each(at.parameters))
        error = (self.wanted - values) @ self.gram
        for place in range(parameters[0].shape[1]):
            columns = slice(place * group, (place + 1) * group)
            bases = bases_of(quantizer, codes[:, columns])  # (rows, parameters, width)
            square = (bases @ self.gram[columns, columns] @ bases.mT).double()
            slope = (bases @ error[:, columns, None])[..., 0].double()
            old = torch.stack([part[:, place] for part in parameters], 1)
            units = torch.stack([part[:, place] for part in at.units], 1) if storable else None
            new = self._best(old, square, slope, units)
            for part, column in zip(parameters, new.unbind(1), strict=True):
                part[:, place] = column
            fresh = quantizer.decode(codes[:, columns], *(column[:, None] for column in new.unbind(1)))
            error -= (fresh - values[:, columns]) @ self.gram[columns]
            values[:, columns] = fresh
        return self._at(replace(at, values=values, parameters=tuple(parameters)))

    def _best(self, old: Tensor, square: Tensor, slope: Tensor, units: Tensor | None) -> Tensor:
        """The parameters (rows, P) that leave least, from those of now, with the curvature and the slope of the loss there.

        With `units` one after the other is set to the nearest storable one, and the others are solved again, in every order.
        """
        count = old.shape[1]
        best, best_gain = old, torch.zeros_like(slope[:, 0])
        for order in permutations(range(count)) if units is not None else [()]:
            change, free = torch.zeros_like(slope), list(range(count))
            for p in (*order, None):
                change[:, free] = _solved(square, slope - (square @ change[..., None])[..., 0], free, change)
                if p is None:
                    break
                change[:, p] = self._storable(old + change, units, p) - old[:, p]
                free.remove(p)
            gain = (2 * change * slope - change * (square @ change[..., None])[..., 0]).sum(1)
            new = (old + change).float()
            takes = (gain > best_gain) & new.isfinite().all(1) & (new[:, 0] > 0)
            best, best_gain = torch.where(takes[:, None], new, best), torch.where(takes, gain, best_gain)
        return best

    def _storable(self, wished: Tensor, units: Tensor | None, p: int) -> Tensor:
        assert units is not None, "what can be stored depends on the units"
        quantizer = self.levels.quantizer
        columns = tuple(wished.float().unbind(1))
        found = storage_of(quantizer, self.levels.group).nearest(quantizer.stored, columns, tuple(units.unbind(1)))
        return found[p].double()

    def _start(self, order: Order, wished: tuple[Tensor, ...]) -> Rounded:
        units, parameters = self._storable_parameters(wished)
        values = round_in_order(self.wanted, order, parameters, self.levels)
        return self._at(Rounded(values, parameters, units, self.wanted.new_zeros(len(values), 1, dtype=torch.float64)))

    def _storable_parameters(self, wished: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The units for parameters like `wished`, and the nearest parameters with them."""
        storage, names = storage_of(self.levels.quantizer, self.levels.group), self.levels.quantizer.stored
        units = storage.units(names, wished)
        return units, tuple(part.float() for part in storage.nearest(names, wished, units))

    def _at(self, point: Rounded) -> Rounded:
        missing = self.wanted - point.values
        return replace(point, left=((missing @ self.gram) * missing).sum(1, keepdim=True, dtype=torch.float64))

    def _each(self, parameters: tuple[Tensor, ...]) -> list[Tensor]:
        return [part.repeat_interleave(self.levels.group, 1)[:, : self.wanted.shape[1]] for part in parameters]

    @staticmethod
    def _loss(at: Rounded) -> float:
        return float(at.left.sum())


def _solved(square: Tensor, slope: Tensor, free: list[int], change: Tensor) -> Tensor:
    """`change` of the parameters `free`, moved to the minimiser over them."""
    if not free:
        return change[:, free]
    part = square[:, free][:, :, free]
    ridge = RIDGE * part.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    regular = part + ridge[:, None, None] * torch.eye(len(free), dtype=part.dtype, device=part.device)
    step: Tensor = torch.linalg.solve_ex(regular, slope[:, free, None])[0][..., 0]
    return change[:, free] + step


def bases_of(quantizer: Quantizer, codes: Tensor) -> Tensor:
    """What each parameter is multiplied by for these codes (rows, width): (rows, parameters, width)."""
    count = len(quantizer.stored)
    each = torch.eye(count, dtype=torch.float32, device=codes.device)
    return torch.stack([quantizer.decode(codes, *each[p]).expand_as(codes) for p in range(count)], 1)


def needs_rows(quantizer: Quantizer) -> bool:
    """Whether a core without wrappers of this quantizer is solved here: not if the sweep can do it, nor if its values are not linear."""
    if has_scales_alone(quantizer) and storage_of(quantizer).span == 1:
        return False
    least, greatest = quantizer.range
    codes = torch.arange(least, greatest + 1, dtype=torch.float32, device="cpu")[None]
    some = torch.arange(1, len(quantizer.stored) + 1, dtype=torch.float32, device="cpu") / 3
    together = (some[:, None] * bases_of(quantizer, codes)[0]).sum(0)
    return bool(torch.allclose(quantizer.decode(codes[0], *some), together, rtol=1e-5))
