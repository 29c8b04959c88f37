"""How the parameters of the groups of a row are stored: as fp16 numbers, or as small integers under super-scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats.encoding.packing import pack, packed_nbytes, unpack

SINGULAR = {"scales": "scale", "minima": "minimum"}
NEGATIVE = ("minima",)  # parameters that are 0 or less, stored by their size
LARGEST = 65504.0  # of fp16
LEAST = 2.0**-24  # of fp16; every fp16 number is a multiple of it
SIGNIFICANT = 32  # numbers of five significant bits: of them times an integer of at most six bits, fp16 holds every one
TRIES = 16  # super-scales that are compared: all of five significant bits within a factor of two
BETWEEN = 1 + 0.5 / SIGNIFICANT  # times a number of so many bits lies between it and the next one

Columns = dict[str, tuple[int, torch.dtype]]
Parameters = tuple[Tensor, ...]


class Storage(Protocol):
    """Turns the parameters of groups into stored tensors and back.

    Parameters are tensors (rows, groups), one for each name. `units` are tensors of the same shapes, the distances between the values
    that a parameter can take; groups that share a super-scale have the same one.
    """

    @property
    def bits(self) -> int:
        """Bits of a stored parameter, without what groups share."""

    @property
    def span(self) -> int:
        """Number of consecutive groups whose parameters are stored together."""

    def layout(self, names: Sequence[str], groups: int) -> Columns:
        """Columns and element type of each stored tensor, by its name, for the parameters `names` of that many groups."""

    def stored(self, names: Sequence[str], parameters: Parameters) -> Parameters:
        """The tensors of `layout` in its order, on the exact values of fp16 `parameters`; raises HalfplateError if these cannot be stored."""

    def parameters(self, names: Sequence[str], stored: Parameters, groups: int) -> Parameters:
        """The fp16 parameters of the tensors `stored`."""

    def units(self, names: Sequence[str], parameters: Parameters) -> Parameters:
        """The units, fp32, that suit `parameters`, which need not be storable."""

    def nearest(self, names: Sequence[str], parameters: Parameters, units: Parameters) -> Parameters:
        """The nearest storable parameters with these units, fp16; not finite if fp16 cannot hold them."""


@dataclass(frozen=True)
class Halves:
    """Each parameter as an fp16 number."""

    bits: int = 16
    span: int = 1

    def layout(self, names: Sequence[str], groups: int) -> Columns:
        return dict.fromkeys(names, (groups, torch.float16))

    def stored(self, names: Sequence[str], parameters: Parameters) -> Parameters:
        return parameters

    def parameters(self, names: Sequence[str], stored: Parameters, groups: int) -> Parameters:
        return stored

    def units(self, names: Sequence[str], parameters: Parameters) -> Parameters:
        return tuple(torch.zeros_like(part, dtype=torch.float32) for part in parameters)

    def nearest(self, names: Sequence[str], parameters: Parameters, units: Parameters) -> Parameters:
        return tuple(part.to(torch.float16) for part in parameters)


@dataclass(frozen=True)
class SuperScales:
    """Each parameter as an integer of `bits` bits times an fp16 super-scale that `span` groups share; the last may have fewer groups.

    A super-scale of five significant bits times an integer of six is an fp16 number, so what the writers choose is exact in fp16. Of the
    pairs that give the same parameters, the one with the largest super-scale is stored.
    """

    bits: int = 6
    span: int = 8

    def layout(self, names: Sequence[str], groups: int) -> Columns:
        columns: Columns = {}
        for name in names:
            columns[f"{SINGULAR[name]}_codes"] = (packed_nbytes(groups, self.bits), torch.uint8)
            columns[f"super_{name}"] = (-(-groups // self.span), torch.float16)
        return columns

    def stored(self, names: Sequence[str], parameters: Parameters) -> Parameters:
        stored: list[Tensor] = []
        for name, part in zip(names, parameters, strict=True):
            multiples = self._spans((_sign(name) * part.double() / LEAST).long())
            greatest = multiples[..., 0]
            for k in range(1, self.span):
                greatest = torch.gcd(greatest, multiples[..., k])
            codes = torch.where(greatest[..., None] > 0, multiples // greatest.clamp_min(1)[..., None], 0)
            if bool((codes > self._most).any()) or bool((multiples < 0).any()):
                raise HalfplateError(
                    f"{name} are not the products of a super-scale and integers of {self.bits} bits, as core_dtype stores them; round them first"
                )
            stored.append(pack(codes.flatten(1)[:, : part.shape[1]], self.bits))
            stored.append((greatest.double() * LEAST).to(torch.float16))
        return tuple(stored)

    def parameters(self, names: Sequence[str], stored: Parameters, groups: int) -> Parameters:
        found = []
        for place, name in enumerate(names):
            codes, supers = stored[2 * place : 2 * place + 2]
            each = supers.float().repeat_interleave(self.span, 1)[:, :groups]
            sizes = (unpack(codes, groups, self.bits).float() * each).clamp_max_(LARGEST)
            found.append((_sign(name) * sizes).to(torch.float16))
        return tuple(found)

    def units(self, names: Sequence[str], parameters: Parameters) -> Parameters:
        found = []
        for name, part in zip(names, parameters, strict=True):
            sizes = self._spans((_sign(name) * part.float()).clamp_min(0))
            least = sizes.amax(-1, keepdim=True) / self._most
            unit = best = _few_bits(least)
            best_error = torch.full_like(least, torch.inf)
            for _ in range(TRIES):
                error = (sizes - self._multiples(name, sizes, unit)).square().sum(-1, keepdim=True)
                better = error < best_error
                best, best_error = torch.where(better, unit, best), torch.where(better, error, best_error)
                unit = _few_bits(unit * BETWEEN)
            found.append(best.expand_as(sizes).flatten(1)[:, : part.shape[1]].contiguous())
        return tuple(found)

    def nearest(self, names: Sequence[str], parameters: Parameters, units: Parameters) -> Parameters:
        found = []
        for name, part, unit in zip(names, parameters, units, strict=True):
            sizes = self._multiples(name, _sign(name) * part.float(), unit)
            found.append((_sign(name) * sizes).to(torch.float16))
        return tuple(found)

    @property
    def _most(self) -> int:
        return (1 << self.bits) - 1

    def _multiples(self, name: str, sizes: Tensor, unit: Tensor) -> Tensor:
        numbers = (sizes / unit).round_()
        if name not in NEGATIVE:  # a scale of 0 would lose all values of its group; a minimum of 0 loses nothing
            numbers = torch.where(sizes > 0, numbers.clamp_min(1), numbers)
        most = (LARGEST / unit).floor_().clamp_max_(self._most)
        return torch.where(unit > 0, torch.minimum(numbers, most).clamp_min_(0) * unit, 0)

    def _spans(self, matrix: Tensor) -> Tensor:
        """(rows, groups) as (rows, super-groups, span), with zeros after the last group."""
        rows, groups = matrix.shape
        return functional.pad(matrix, (0, -groups % self.span)).reshape(rows, -1, self.span)


def _sign(name: str) -> int:
    return -1 if name in NEGATIVE else 1


def _few_bits(values: Tensor) -> Tensor:
    """The smallest fp16 number of five significant bits that is not below each of `values`, fp32, 0 or more."""
    fraction, exponent = torch.frexp(values)
    above = torch.ldexp((fraction * SIGNIFICANT).ceil(), exponent - SIGNIFICANT.bit_length() + 1)
    return (above / LEAST).ceil() * LEAST


HALVES = Halves()
