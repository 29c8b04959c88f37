"""Matrices of codes in int32 words, as GPTQ, AWQ and compressed-tensors store them, in both directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats.encoding.packing import pack, unpack

WORD = 32  # bits
# AWQ stores value AWQ_ORDER[k] of each eight at place k of a word (Lin et al., arXiv 2306.00978, the layout of its kernels).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits (rows, count) as one bit stream per row, lowest bits first: int32 (rows, ceil(count · bits / 32))."""
    stream = pack(codes, bits)
    return functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)


def unpack_words(words: Tensor, count: int, bits: int) -> Tensor:
    """Undo `pack_words`: int32 (rows, words) to uint8 (rows, count)."""
    return unpack(words.contiguous().view(torch.uint8), count, bits)


def read_compressed_tensors(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The matrix of a module in the format pack-quantized of compressed-tensors: fp32 (d_out, d_in).

    tensors: `weight_packed` int32 (d_out, ceil(d_in · bits / 32)), `weight_scale` (d_out, groups), `weight_shape`, and `weight_zero_point`
        int32 (ceil(d_out · bits / 32), groups) of asymmetric codes. A code is q + 2^(bits − 1).
    """
    rows, columns = (int(side) for side in tensors["weight_shape"])
    scales = tensors["weight_scale"].float()
    q = unpack_words(tensors["weight_packed"], columns, bits).float() - (1 << bits - 1)
    width = -(-columns // scales.shape[1])
    if "weight_zero_point" in tensors:
        zeros = unpack_words(tensors["weight_zero_point"].T, rows, bits).T.float() - (1 << bits - 1)
        q = q - zeros.repeat_interleave(width, 1)[:, :columns]
    return q * scales.repeat_interleave(width, 1)[:, :columns]


def read_gptq(tensors: Mapping[str, Tensor], bits: int, zeros_less_one: bool) -> Tensor:
    """The matrix of a module in the format of GPTQ: fp32 (d_out, d_in).

    tensors: `qweight` int32 (d_in · bits / 32, d_out), `scales` (groups, d_out), `qzeros` int32 (groups, d_out · bits / 32) and, if
        the order of the inputs was changed, `g_idx` (d_in,), the group of each input.
    zeros_less_one: whether `qzeros` holds the zeros minus one, as version 1 of the format does.
    """
    scales = tensors["scales"].float()
    groups, rows = scales.shape
    columns = tensors["qweight"].shape[0] * WORD // bits
    codes = unpack_words(tensors["qweight"].T, columns, bits).float()
    zeros = unpack_words(tensors["qzeros"], rows, bits).float() + int(zeros_less_one)
    group = (
        tensors["g_idx"].long()
        if "g_idx" in tensors
        else torch.arange(columns, dtype=torch.int64, device="cpu") // (columns // groups)
    )
    return (codes - zeros[group].T) * scales[group].T


def read_awq(tensors: Mapping[str, Tensor], bits: int = 4) -> Tensor:
    """The matrix of a module in the format of AWQ's GEMM kernel, four bits: fp32 (d_out, d_in).

    tensors: `qweight` int32 (d_in, d_out / 8), `qzeros` int32 (groups, d_out / 8), `scales` (groups, d_out).
    """
    scales = tensors["scales"].float()
    groups, rows = scales.shape
    place = torch.tensor([AWQ_ORDER.index(value) for value in range(WORD // bits)], dtype=torch.int64, device="cpu")

    def ordered(words: Tensor) -> Tensor:
        codes = unpack_words(words, rows, bits).reshape(len(words), -1, WORD // bits)
        return codes[:, :, place].reshape(len(words), rows).float()

    codes, zeros = ordered(tensors["qweight"]), ordered(tensors["qzeros"])
    width = len(codes) // groups
    return ((codes - zeros.repeat_interleave(width, 0)) * scales.repeat_interleave(width, 0)).T.contiguous()
