"""Rotations of the residual stream and of each head of v: the same function, with weights that a grid of few bits rounds better."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfplate.models.sources import Source, skeleton
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.base import LLAMA_LIKE, Maker, Transform, making

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NORMS = INPUT_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
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
        if kind in LLAMA_LIKE:
            return None
        norms = [name for name, _ in skeleton(source).named_modules() if "norm" in name.rpartition(".")[2]]
        where = f"{norms[0]} of a {kind} model" if norms else f"the norms of a {kind} model"
        return f"it is not known how to multiply {where} into the linears after it; expected one of {', '.join(LLAMA_LIKE)}"

    def configuration(self, source: Source) -> PretrainedConfig:
        config = deepcopy(source.config)
        config.tie_word_embeddings = False
        return config

    def held_nbytes(self, source: Source) -> int:
        # In fp64: the tensor and its product, and the rotation.
        hidden: int = source.config.hidden_size
        return 2 * super().held_nbytes(source) + 16 * hidden * hidden

    def open(self, source: Source) -> Maker:
        return making(_Rotation(StreamedModel(source), source.config).turned)


class _Rotation:
    """Makes the tensors of the result one by one."""

    def __init__(self, model: StreamedModel, config: PretrainedConfig) -> None:
        self.model = model
        self.stream = orthogonal(config.hidden_size, SEED)
        heads = config.num_attention_heads
        self.head = orthogonal(getattr(config, "head_dim", None) or config.hidden_size // heads, SEED + 1)

    def turned(self, name: str) -> Tensor:
        """The tensor `name` of the result, fp32."""
        _, kind, leaf = place_of(self.model, name)
        tensor = self.model.read(name)
        if name == NORM or kind in NORMS:
            return torch.ones_like(tensor)
        wide = tensor.double()
        if kind == "self_attn.o_proj" and leaf == "weight":
            wide = _by_heads(wide, self.head)
        wide = in_basis(self.model, name, wide, self.stream)
        if kind == "self_attn.v_proj":
            wide = _by_heads(wide.T, self.head).T if leaf == "weight" else _by_heads(wide, self.head)
        return wide.to(torch.float32)


def place_of(model: StreamedModel, name: str) -> tuple[int | None, str, str]:
    """The layer of the tensor `name`, the name of its module there, and its own; None and an empty name outside the layers."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith(f"{model.prefix}."):
        return None, "", leaf
    layer, _, kind = module.removeprefix(f"{model.prefix}.").partition(".")
    return int(layer), kind, leaf


def in_basis(model: StreamedModel, name: str, wide: Tensor, basis: Tensor) -> Tensor:
    """The tensor `name`, fp64, for a residual stream in `basis` (d, n), with the norm before it multiplied in; norms have none.

    wide: the tensor as the model has it, but for what happens inside the heads.
    """
    layer, kind, leaf = place_of(model, name)
    if name == EMBEDDING:
        return wide @ basis
    if name == HEAD:
        return wide * model.read(NORM).double() @ basis
    if kind in READERS and leaf == "weight":
        return wide * model.read(f"{model.prefix}.{layer}.{READERS[kind]}.weight").double() @ basis
    return basis.T @ wide if kind in WRITERS else wide


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
