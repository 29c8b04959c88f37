"""The type in which a GGUF file holds each tensor of a model: codes as they are where ggml has a type for them, else floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.formats import Chain, CompressedMatrix
from halfplate.formats.quantizers import quantizer_of
from halfplate.models.gguf_blocks import block_type, encode, obstacle
from halfplate.models.gguf_families.family import Family
from halfplate.models.gguf_families.tensors import names_in_file

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Types for matrices of floats that the gguf package can write; Q8_0, Q5_0 and Q4_0 round to nearest.
FLOAT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0")
Values = NDArray[np.float32]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model as the file holds it.

    kind: ggml's name of the type.
    shape: (rows, columns), or other dimensions, of the values.
    values: returns the values of the checkpoint in fp32.
    content: returns what is written: fp32 or fp16 values, or the bytes of each row (uint8).
    rounds: whether the file may hold the values rounded.
    obstacle: why no type holds a compressed matrix exactly, as the end of a sentence about it.
    """

    kind: str
    shape: tuple[int, ...]
    values: Callable[[], Values]
    content: Callable[[], NDArray[Any]]
    rounds: bool = False
    obstacle: str | None = None

    def decoded(self) -> Values:
        """The values of `content`, fp32, by the reader of the gguf package."""
        from gguf import GGMLQuantizationType, dequantize

        content = self.content()
        if content.dtype != np.uint8:
            return content.astype(np.float32)
        values: Values = dequantize(content, GGMLQuantizationType[self.kind])
        return values.astype(np.float32).reshape(self.shape)


def stored_tensors(
    model: Any, family: Family, half: bool = True, embedding_type: str | None = None
) -> dict[str, StoredTensor]:
    """The tensors to write by their name in the full-size model, in its order.

    half: F16 for matrices of floats, else F32.
    embedding_type: one of FLOAT_TYPES for an embedding and an output layer of floats.
    Raises HalfplateError for values beyond the range of F16, and if rows do not fit `embedding_type`.
    """
    found: dict[str, StoredTensor] = {}
    for key, weight in _weights(model, family):
        parts = names_in_file(family, key)
        if isinstance(weight, Chain):
            found[key] = _of_matrix(key, weight)
        elif not (half or embedding_type) or weight.ndim < 2 or any("ffn_gate_inp" in part for part in parts):
            # Routers are small and sensitive.
            found[key] = _of_floats(key, weight, "F32")
        elif embedding_type is not None and set(parts) & {EMBEDDING, HEAD}:
            found[key] = _of_floats(key, weight, embedding_type)
        else:
            found[key] = _of_floats(key, weight, "F16" if half else "F32")
    return found


def _weights(model: Any, family: Family) -> Iterator[tuple[str, Tensor | Chain]]:
    """The tensors and the compressed matrices of a model. A shared one comes once, except for a head that llama.cpp needs as a separate tensor."""
    compressed = {name: part for name, part in model.named_modules() if isinstance(part, CompressedMatrix)}
    tied = set(model.all_tied_weights_keys or {})
    if family.head == "own":
        tied.discard("lm_head.weight")
    met: set[str] = set()
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if key in tied or (owner in met and leaf != "bias"):
            continue
        if owner in compressed and leaf != "bias":
            met.add(owner)
            yield f"{owner}.weight", compressed[owner].matrix
        else:
            yield key, tensor
    head = compressed.get("lm_head")
    if head is not None and head.spec.same_as is not None and family.head == "own":
        yield "lm_head.weight", head.matrix


def _of_matrix(key: str, matrix: Chain) -> StoredTensor:
    spec, quantizer = matrix.spec, quantizer_of(matrix.spec.core_dtype)
    hindrance = obstacle(spec)
    if hindrance is not None:
        return _of_floats(key, matrix, "F16", hindrance)
    if quantizer is None:
        exact = _same(matrix.dense(), torch.float16)
        return _of_floats(key, matrix, "F16" if exact else {"bf16": "BF16"}.get(spec.core_dtype, "F32"))
    kind = block_type(quantizer)
    assert kind is not None, "there is an obstacle otherwise"
    return StoredTensor(kind.name, matrix.shape, lambda: _numbers(matrix), lambda: encode(matrix.core, kind))


def _of_floats(key: str, weight: Tensor | Chain, kind: str, hindrance: str | None = None) -> StoredTensor:
    shape = tuple(weight.shape)
    _check_width(key, shape, kind)
    return StoredTensor(
        kind, shape, lambda: _numbers(weight), lambda: _content(key, _numbers(weight), kind), kind != "F32", hindrance
    )


def _check_width(key: str, shape: tuple[int, ...], kind: str) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    if shape and shape[-1] % width:
        raise HalfplateError(
            f"embedding_type={kind.lower()!r} needs rows of a multiple of {width} values, {key} has {shape[-1]}; use f16"
        )


def _content(key: str, values: Values, kind: str) -> NDArray[Any]:
    if kind == "F32":
        return values
    if kind == "F16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise HalfplateError(f"format='gguf': {key} holds values beyond the range of F16; export it as dense")
        return half
    from gguf import GGMLQuantizationType, quantize

    written: NDArray[Any] = quantize(values, GGMLQuantizationType[kind])
    return written.view(np.uint8)


def _numbers(weight: Tensor | Chain) -> Values:
    whole = weight.dense() if isinstance(weight, Chain) else weight.detach().float()
    values: Values = whole.detach().cpu().numpy()
    return values


def _same(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds the values exactly."""
    return torch.equal(values.to(dtype).float(), values)
