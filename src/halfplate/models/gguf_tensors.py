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
from halfplate.formats import Chain, CompressedMatrix, NMSparse, WeightSpec
from halfplate.formats.quantizers import quantizer_of
from halfplate.models.experts import experts_of
from halfplate.models.gguf_blocks import block_type, common_type, obstacle
from halfplate.models.gguf_families.family import Family
from halfplate.models.gguf_families.tensors import names_in_file
from halfplate.pattern import DENSE

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Types for matrices of floats. Those of codes round to nearest, some by the gguf package, and these by a quantizer and its groups.
ROUNDED = {
    "Q6_K": ("int6k", 16),
    "Q5_K": ("affine5k", 32),
    "Q4_K": ("affine4k", 32),
    "IQ4_NL": ("nl4", 32),
    "IQ4_XS": ("nl4s", 32),
    "Q3_K": ("int3k", 16),
    "Q2_K": ("affine2k", 16),
}
FLOAT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", *ROUNDED)
CHUNK = 1 << 22  # values of a matrix of floats that are rounded at once
Values = NDArray[np.float32]
Experts = tuple[Tensor | Chain, ...]


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
        if isinstance(weight, tuple):
            found[key] = _of_experts(key, weight, "F16" if half else "F32")
        elif isinstance(weight, Chain):
            found[key] = _of_matrix(key, weight)
        elif not (half or embedding_type) or weight.ndim < 2 or any("ffn_gate_inp" in part for part in parts):
            # Routers are small and sensitive.
            found[key] = _of_floats(key, weight, "F32")
        elif embedding_type is not None and set(parts) & {EMBEDDING, HEAD}:
            found[key] = _of_floats(key, weight, embedding_type)
        else:
            found[key] = _of_floats(key, weight, "F16" if half else "F32")
    return found


def _weights(model: Any, family: Family) -> Iterator[tuple[str, Tensor | Chain | Experts]]:
    """The tensors and the compressed matrices of a model. A shared one comes once, except for a head that llama.cpp needs as a separate tensor.

    The matrices of experts come as one for all experts of a layer.
    """
    experts = experts_of(model)
    compressed = {name: part for name, part in model.named_modules() if isinstance(part, CompressedMatrix)}
    tied = set(model.all_tied_weights_keys or {})
    if family.head == "own":
        tied.discard("lm_head.weight")
    met: set[str] = set()
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if key in tied or (owner in met and leaf != "bias"):
            continue
        layer, number, linear = [*owner.rsplit(".", 2), "", ""][:3]
        if layer in experts and number.isdigit() and leaf != "bias":
            members = [f"{layer}.{other}.{linear}" for other in range(experts[layer].layout.experts)]
            met.update(members)
            # The down projection of all experts has the name that it has in the original.
            name = f"{layer}.{linear}" if linear == "down_proj" else f"{layer}.{linear}.weight"
            yield name, tuple(compressed[one].matrix if one in compressed else _weight(model, one) for one in members)
            continue
        if owner in compressed and leaf != "bias":
            met.add(owner)
            yield f"{owner}.weight", compressed[owner].matrix
        else:
            yield key, tensor
    head = compressed.get("lm_head")
    if head is not None and head.spec.same_as is not None and family.head == "own":
        yield "lm_head.weight", head.matrix


def _weight(model: Any, name: str) -> Tensor:
    weight: Tensor = model.get_submodule(name).weight
    return weight


def _of_experts(key: str, experts: Experts, plain: str) -> StoredTensor:
    """The matrices of all experts of a layer in the type that holds each of them; in floats if there is none, or if one is not compressed."""
    shape = (len(experts), *experts[0].shape)
    specs = {one.spec.alone for one in experts if isinstance(one, Chain)}
    matrices = [one for one in experts if isinstance(one, Chain)]
    hindrance = next((why for spec in specs if (why := obstacle(spec)) is not None), None)
    kind = common_type(specs) if len(matrices) == len(experts) else None
    if specs and kind is None and hindrance is None:
        hindrance = "are of experts that have no type in common"

    def values() -> Values:
        return np.stack([_numbers(one) for one in experts])

    if kind is None:
        kind_name = "F16" if specs else plain
        return StoredTensor(
            kind_name, shape, values, lambda: _content(key, values(), kind_name), kind_name != "F32", hindrance
        )
    return StoredTensor(kind.name, shape, values, lambda: np.stack([kind.encode(one.core) for one in matrices]))


def _of_matrix(key: str, matrix: Chain) -> StoredTensor:
    spec, quantizer = matrix.spec, quantizer_of(matrix.spec.core_dtype)
    hindrance = obstacle(spec)
    if hindrance is not None:
        return _of_floats(key, matrix, "F16", hindrance)
    if quantizer is None:
        exact = _same(matrix.dense(), torch.float16)
        return _of_floats(key, matrix, "F16" if exact else {"bf16": "BF16"}.get(spec.core_dtype, "F32"))
    kind = block_type(spec)
    assert kind is not None, "there is an obstacle otherwise"
    return StoredTensor(kind.name, matrix.shape, lambda: _numbers(matrix), lambda: kind.encode(matrix.core))


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
    if kind in ROUNDED:
        return _rounded(values, *ROUNDED[kind])
    from gguf import GGMLQuantizationType, quantize

    written: NDArray[Any] = quantize(values, GGMLQuantizationType[kind])
    return written.view(np.uint8)


def _rounded(values: Values, core_dtype: str, group: int) -> NDArray[np.uint8]:
    """The blocks of `values` (rows, columns), rounded to nearest, a part of the rows at a time."""
    rows, columns = values.shape
    kind = block_type(WeightSpec(rows, columns, pattern=DENSE, core_dtype=core_dtype, group=group))
    assert kind is not None, "_check_width refuses other rows"
    step = max(CHUNK // columns, 1)
    parts = (torch.from_numpy(values[start : start + step]) for start in range(0, rows, step))
    return np.concatenate([kind.encode(NMSparse.from_dense(part, None, DENSE, core_dtype, group)) for part in parts])


def _numbers(weight: Tensor | Chain) -> Values:
    whole = weight.dense() if isinstance(weight, Chain) else weight.detach().float()
    values: Values = whole.detach().cpu().numpy()
    return values


def _same(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds the values exactly."""
    return torch.equal(values.to(dtype).float(), values)
