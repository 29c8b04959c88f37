"""Matrices of codes in words of 32 bits, as GPTQ, AWQ, compressed-tensors and MLX store them, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats.encoding.packing import pack, unpack

WORD = 32  # bits
# AWQ stores value AWQ_ORDER[k] of each eight at place k of a word (Lin et al., arXiv 2306.00978, the layout of its kernels).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AT_ONCE = 1 << 20  # values that are decoded at once


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits (rows, count) as one bit stream per row, lowest bits first: int32 (rows, ceil(count · bits / 32))."""
    stream = pack(codes, bits)
    return functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)


def unpack_words(words: Tensor, count: int, bits: int) -> Tensor:
    """Undo `pack_words`: int32 (rows, words) to uint8 (rows, count)."""
    return unpack(words.contiguous().view(torch.uint8), count, bits)


def rows_at_once(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix in parts of about `AT_ONCE` values, so that decoding holds little besides the result; parts begin at multiples of a word."""
    step = max(AT_ONCE // max(columns, 1) // WORD, 1) * WORD
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def read_compressed_tensors(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The matrix of a module in the format pack-quantized of compressed-tensors: fp32 (d_out, d_in).

    tensors: `weight_packed` int32 (d_out, ceil(d_in · bits / 32)), `weight_scale` (d_out, groups) or of one number, `weight_shape`,
        `weight_zero_point` int32 (ceil(d_out · bits / 32), groups) of asymmetric codes, and, if the order of the inputs was changed,
        `weight_g_idx` (d_in,), the group of each input. A code is q + 2^(bits − 1).
    """
    rows, columns = (int(side) for side in tensors["weight_shape"])
    scales = tensors["weight_scale"].float()
    scales = scales.reshape(1, 1).expand(rows, 1) if scales.numel() == 1 else scales
    groups = scales.shape[1]
    zeros = torch.full((rows, groups), 1 << bits - 1, dtype=torch.uint8, device="cpu")
    if "weight_zero_point" in tensors:
        zeros = unpack_words(tensors["weight_zero_point"].T, rows, bits).T
    group = tensors["weight_g_idx"].long() if "weight_g_idx" in tensors else _group_of(columns, groups)
    values = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    for part in rows_at_once(rows, columns):
        codes = unpack_words(tensors["weight_packed"][part], columns, bits).float()
        values[part] = (codes - zeros[part][:, group]) * scales[part][:, group]
    return values


def read_gptq(tensors: Mapping[str, Tensor], bits: int, zeros_less_one: bool) -> Tensor:
    """The matrix of a module in the format of GPTQ: fp32 (d_out, d_in).

    tensors: `qweight` int32 (d_in · bits / 32, d_out), `scales` (groups, d_out), `qzeros` int32 (groups, d_out · bits / 32) and, if
        the order of the inputs was changed, `g_idx` (d_in,), the group of each input.
    zeros_less_one: whether `qzeros` holds the zeros minus one, as version 1 of the format does.
    """
    scales = tensors["scales"].float().T
    rows, groups = scales.shape
    columns = tensors["qweight"].shape[0] * WORD // bits
    zeros = unpack_words(tensors["qzeros"], rows, bits).float().T + int(zeros_less_one)
    group = tensors["g_idx"].long() if "g_idx" in tensors else _group_of(columns, groups)
    values = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    for part in rows_at_once(rows, columns):
        codes = unpack_words(tensors["qweight"][:, part].T, columns, bits).float()
        values[part] = (codes - zeros[part][:, group]) * scales[part][:, group]
    return values


def read_awq(tensors: Mapping[str, Tensor], bits: int = 4) -> Tensor:
    """The matrix of a module in the format of AWQ's GEMM kernel, four bits: fp32 (d_out, d_in).

    tensors: `qweight` int32 (d_in, d_out / 8), `qzeros` int32 (groups, d_out / 8), `scales` (groups, d_out).
    """
    scales = tensors["scales"].float().T
    rows, groups = scales.shape
    each = WORD // bits
    place = torch.tensor([AWQ_ORDER.index(value) for value in range(each)], dtype=torch.int64, device="cpu")

    def ordered(words: Tensor) -> Tensor:
        count = words.shape[1] * each
        codes = unpack_words(words, count, bits).reshape(len(words), -1, each)
        return codes[:, :, place].reshape(len(words), count).float().T

    zeros, columns = ordered(tensors["qzeros"]), len(tensors["qweight"])
    group = _group_of(columns, groups)
    values = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    for part in rows_at_once(rows, columns):
        codes = ordered(tensors["qweight"][:, part.start // each : part.stop // each])
        values[part] = (codes - zeros[part][:, group]) * scales[part][:, group]
    return values


def read_mlx(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The matrix of a module in MLX's affine mode: fp32 (d_out, d_in).

    tensors: `weight` uint32 (d_out, d_in · bits / 32), a bit stream per row; `scales` and `biases` (d_out, groups).
    """
    scales, biases = tensors["scales"].float(), tensors["biases"].float()
    rows, groups = scales.shape
    columns = tensors["weight"].shape[1] * WORD // bits
    group = _group_of(columns, groups)
    words = tensors["weight"].view(torch.int32)
    values = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    for part in rows_at_once(rows, columns):
        codes = unpack_words(words[part], columns, bits).float()
        values[part] = codes * scales[part][:, group] + biases[part][:, group]
    return values


def _group_of(columns: int, groups: int) -> Tensor:
    """The group of each column, of groups of equal width."""
    return torch.arange(columns, dtype=torch.int64, device="cpu") // (columns // groups)
