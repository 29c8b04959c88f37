"""Rotations of the residual stream and of each head of v: the same function, with weights that a grid of few bits rounds better."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfplate.models.sources import Source, skeleton
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.base import Maker, Piece, Transform

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # their norms multiply by the weight, not by 1 + weight
INPUT_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
# The linears that read the residual stream, with the norm before them, and those that write to it.
READERS = {
    "self_attn.q_proj": INPUT_NORM,
    "self_attn.k_proj": INPUT_NORM,
    "self_attn.v_proj": INPUT_NORM,
    "mlp.gate_proj": MLP_NORM,
    "mlp.up_proj": MLP_NORM,
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SEED = 20261128


class Rotate(Transform):
    """Multiplies each RMSNorm into the linears after it, and rotates what lies between layers and inside the heads of v.

    A head that is tied to the embedding becomes a tensor of its own, because the last norm is multiplied into it alone.

    Source: QuaRot, arXiv 2404.00456, the rotations that cost nothing at run time.
    """

    name = "rotate"
    version = 1
    summary = "rotate the residual stream and the heads of v, so that grids of few bits lose less; unties a tied head"

    def refusal(self, source: Source) -> str | None:
        kind = source.config.model_type
        if kind in FAMILIES:
            return None
        norms = [name for name, _ in skeleton(source).named_modules() if "norm" in name.rpartition(".")[2]]
        where = f"{norms[0]} of a {kind} model" if norms else f"a {kind} model"
        return (
            f"it is not known how to multiply {where} into the linears after it; expected one of {', '.join(FAMILIES)}"
        )

    def configuration(self, source: Source) -> PretrainedConfig:
        config = deepcopy(source.config)
        config.tie_word_embeddings = False
        return config

    def held_nbytes(self, source: Source) -> int:
        # In fp64: the tensor and its product, and the rotation.
        hidden: int = source.config.hidden_size
        return 2 * super().held_nbytes(source) + 16 * hidden * hidden

    def open(self, source: Source) -> Maker:
        rotation = _Rotation(StreamedModel(source), source.config)

        def make(piece: Piece) -> Iterator[tuple[str, Tensor]]:
            for name in piece.entries:
                yield name, rotation.turned(name)

        return make


class _Rotation:
    """Makes the tensors of the result one by one."""

    def __init__(self, model: StreamedModel, config: PretrainedConfig) -> None:
        self.model = model
        self.stream = orthogonal(config.hidden_size, SEED)
        heads = config.num_attention_heads
        self.head = orthogonal(getattr(config, "head_dim", None) or config.hidden_size // heads, SEED + 1)

    def turned(self, name: str) -> Tensor:
        """The tensor `name` of the result, fp32."""
        module, _, leaf = name.rpartition(".")
        layer = module.removeprefix(f"{self.model.prefix}.").partition(".")
        kind = layer[2] if module.startswith(f"{self.model.prefix}.") else ""
        tensor = self.model.read(name)
        if name == NORM or kind in (INPUT_NORM, MLP_NORM):
            return torch.ones_like(tensor)
        wide = tensor.double()
        if name == EMBEDDING:
            wide = wide @ self.stream
        elif name == HEAD:
            wide = wide * self.model.read(NORM).double() @ self.stream
        elif kind in READERS and leaf == "weight":
            norm = f"{self.model.prefix}.{layer[0]}.{READERS[kind]}.weight"
            wide = wide * self.model.read(norm).double() @ self.stream
        if kind == "self_attn.v_proj":
            wide = _by_heads(wide.T, self.head).T if leaf == "weight" else _by_heads(wide, self.head)
        elif kind == "self_attn.o_proj" and leaf == "weight":
            wide = _by_heads(wide, self.head)
        if kind in WRITERS:
            wide = self.stream.T @ wide
        return wide.to(torch.float32)


def _by_heads(matrix: Tensor, head: Tensor) -> Tensor:
    """`matrix` (..., heads · d) with the values of each head multiplied by `head` (d, d)."""
    turned: Tensor = (matrix.reshape(*matrix.shape[:-1], -1, len(head)) @ head).reshape(matrix.shape)
    return turned


def orthogonal(size: int, seed: int) -> Tensor:
    """An orthogonal matrix fp64 (size, size) that spreads every axis over all others: random signs, then Hadamard ⊗ cosines.

    The largest power of two in `size` is a Hadamard matrix, and the odd rest a discrete cosine transform. The same on every machine, up to
    the rounding of cosines.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    matrix = _cosines(odd)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu") / math.sqrt(2)
    while len(matrix) < size:
        matrix = torch.kron(two, matrix)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
    return matrix * signs


def _cosines(size: int) -> Tensor:
    """The orthogonal discrete cosine transform (DCT-II), fp64 (size, size)."""
    at = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / size * at[:, None] * (at + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


ROTATE = Rotate()
