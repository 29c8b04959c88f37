"""How the kernels hold the codes of a core: the kinds of src/runtime.h, and stored codes rewritten for them."""

from dataclasses import replace

import torch
from torch import Tensor

from halfplate.formats.encoding.packing import check_padding
from halfplate.formats.encoding.packing import pack as pack_codes
from halfplate.formats.encoding.packing import unpack as unpack_codes
from halfplate.formats.quantizers import QUANTIZERS, quantizer_of, whole_numbers
from halfplate.formats.quantizers.table import Table
from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native

KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4}
TABLE, FIVE = 5, 6  # the kinds of codes of 4 and of 5 bits whose numbers stand in the header
FIVE_ON = ("avx512", "avx2")  # shorter vectors decode codes of 5 bits more slowly than bytes


def kind_of(spec: WeightSpec, as_bytes: bool) -> int:
    """The kind that the kernels of this machine hold a core in.

    as_bytes: whether activations are rounded to int8. Codes of 5 bits have a kind only in unpruned cores for activations in floats.
    """
    quantizer = quantizer_of(spec.core_dtype)
    if quantizer is None or spec.core_dtype in KINDS:
        return KINDS[spec.core_dtype]
    if quantizer.bits == 5 and spec.pattern.is_dense and not as_bytes and native.isa() in FIVE_ON:
        return FIVE
    return KINDS["int8"] if quantizer.bits > 4 else TABLE if isinstance(quantizer, Table) else KINDS["int4"]


def kernel_spec(spec: WeightSpec, kind: int) -> WeightSpec:
    """The matrix as kernels of `kind` read it: codes as int8, int5 or int4, with fp16 scales."""
    if spec.core_dtype in KINDS:
        return spec
    return replace(spec, core_dtype={KINDS["int8"]: "int8", FIVE: "int5"}.get(kind, "int4"))


def numbers_of(spec: WeightSpec, kind: int) -> dict[int, int]:
    """The numbers of the codes of a core of kind TABLE or FIVE, by their two's complement; empty for other kinds."""
    if kind not in (TABLE, FIVE):
        return {}
    quantizer = QUANTIZERS.get(spec.core_dtype)
    numbers = enumerate(whole_numbers(quantizer) or (), quantizer.range[0])
    return {code % (32 if kind == FIVE else 16): number for code, number in numbers}


def recoded(weight: Tensor, spec: WeightSpec, held: str, wanted: str) -> Tensor:
    """The stored core of a matrix of `spec`, its codes of type `held` rewritten as those of type `wanted`.

    Between int8 and a table, the values stay the same, whose numbers are codes of int8; otherwise the codes do, without their offset.
    """
    if held == wanted:
        return weight
    before, after = QUANTIZERS.get(held), QUANTIZERS.get(wanted)
    if before.bits == after.bits:
        return weight
    kept, rows = spec.pattern.kept(spec.d_in), weight.reshape(spec.d_out, -1)
    check_padding(rows, kept, before.bits, "weight")
    codes = unpack_codes(rows, kept, before.bits).to(torch.int16) - (1 << before.bits - 1)
    if "int8" in (held, wanted) and (isinstance(before, Table) or isinstance(after, Table)):
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        codes = after.nearest(before.decode(codes, one), one).to(torch.int16)
    return pack_codes(codes + (1 << after.bits - 1), after.bits).reshape(*weight.shape[:-1], -1)
