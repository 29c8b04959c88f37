"""Matrices of small floats with shared scales, as FP8 and MXFP4 checkpoints store them, in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halfplate.models.packed_words import rows_at_once

# The sixteen values of E2M1 (OCP Microscaling Formats, version 1.0, table 5); the highest bit of a code is the sign.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS = 127  # a scale s stands for 2^(s − 127)
E8M0_NAN = 255
MX_BLOCK = 32  # values that share a scale


def read_scaled(tensors: Mapping[str, Tensor], height: int, width: int) -> Tensor:
    """Numbers times the scales of blocks: fp32 (…, d_out, d_in).

    tensors: `codes` of any number type (…, d_out, d_in), and `scales` (…, ceil(d_out / height), ceil(d_in / width)), the factors of blocks;
        of integers also `zeros` in the form of the scales, which are subtracted first.
    """
    codes, scales, zeros = tensors["codes"], tensors["scales"], tensors.get("zeros")
    if codes.ndim == 3:
        values = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
        for number, (matrix, own) in enumerate(zip(codes, scales, strict=True)):
            values[number] = read_scaled({"codes": matrix, "scales": own}, height, width)
        return values
    rows, columns = codes.shape
    scales = scales.float()

    def of_columns(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(width, 1)[:, :columns]

    values = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    for part in rows_at_once(rows, columns):
        block = torch.arange(part.start, part.stop, dtype=torch.int64, device="cpu") // height
        found = codes[part].float()
        if zeros is not None:
            found -= of_columns(zeros[block].float())
        values[part] = found * of_columns(scales[block])
    return values


def read_mxfp4(tensors: Mapping[str, Tensor], transposed: bool = False) -> Tensor:
    """Matrices in MXFP4: fp32 (…, d_out, d_in), NaN where a scale is.

    tensors: `blocks` uint8 (…, d_out, groups, 16), two codes of E2M1 a byte, the lower half first; `scales` uint8 (…, d_out, groups), exponents of E8M0.
    transposed: return (…, d_in, d_out), as gpt-oss names these matrices.
    """
    blocks, scales = tensors["blocks"], tensors["scales"]
    if blocks.ndim == 4:
        count, rows, groups, pairs = blocks.shape
        sides = (2 * pairs * groups, rows) if transposed else (rows, 2 * pairs * groups)
        every = torch.empty(count, *sides, dtype=torch.float32, device="cpu")
        for number, (one, own) in enumerate(zip(blocks, scales, strict=True)):
            every[number] = read_mxfp4({"blocks": one, "scales": own}, transposed)
        return every
    rows, groups, pairs = blocks.shape
    values = torch.empty(rows, groups, 2 * pairs, dtype=torch.float32, device="cpu")
    table = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)), dtype=torch.float32, device="cpu")
    exponents = [2.0 ** (exponent - E8M0_BIAS) for exponent in range(E8M0_NAN)]
    powers = torch.tensor([*exponents, float("nan")], dtype=torch.float32, device="cpu")
    for part in rows_at_once(rows, groups * 2 * pairs):
        values[part, :, 0::2] = table[(blocks[part] & 15).int()]
        values[part, :, 1::2] = table[(blocks[part] >> 4).int()]
        values[part] *= powers[scales[part].int()][:, :, None]
    matrix = values.reshape(rows, -1)
    return matrix.T.contiguous() if transposed else matrix
