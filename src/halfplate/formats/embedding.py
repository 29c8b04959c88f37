"""The replacement of an embedding whose table is stored as codes."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats.linear import CompressedMatrix
from halfplate.formats.spec import WeightSpec

# The buffer with the factor of embeddings that scale their rows, as in Gemma.
SCALE = "embed_scale"


class CompressedEmbedding(CompressedMatrix):
    """Rows of a table (vocabulary, hidden) of codes, decoded when they are looked up.

    Rows are returned in `dtype`.

    spec: a core without wrappers or other parts.
    replaced: the original embedding; its class, its scale and the type of its weight are kept, its values are not.
    device: as in CompressedMatrix.
    Raises HalfplateError if `replaced` does more than look up rows and scale them.
    """

    def __init__(self, spec: WeightSpec, replaced: nn.Embedding, device: torch.device | str | None = None) -> None:
        super().__init__(spec, device, replaced.weight.dtype)
        scale = embedding_scale(replaced)
        if scale is None:
            raise HalfplateError(f"{type(replaced).__name__} does more than look up rows, so its table must stay dense")
        self.num_embeddings, self.embedding_dim, self.scale = spec.d_out, spec.d_in, scale
        # Not a submodule, and without values: `dense_module` copies it.
        object.__setattr__(
            self, "_replaced", _with_table(replaced, torch.empty(0, dtype=self.dtype, device="meta"), scale)
        )

    def dense_module(self, dtype: torch.dtype) -> nn.Embedding:
        """The original kind of embedding, with the decoded table in `dtype`."""
        return _with_table(cast(nn.Embedding, self._replaced), self.matrix.dense().to(dtype), self.scale)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of the table at `ids` (n,), fp32 (n, hidden)."""
        return self.matrix.core.take(ids).dense()

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to rows (..., hidden) in `dtype`."""
        flat = ids.reshape(-1)
        # Texts repeat tokens, and decoding a row costs more than copying it.
        unique, places = flat.unique(return_inverse=True) if flat.numel() > 1 else (flat, None)
        if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < self.num_embeddings:
            raise IndexError(f"token {int(unique[-1])} is outside the vocabulary of {self.num_embeddings}")
        found = self.rows(unique).to(self.dtype)
        if self.scale != 1.0:
            found = found * torch.tensor(self.scale, dtype=self.dtype, device=found.device)
        found = found if places is None else functional.embedding(places, found)
        return found.reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec.core_dtype}"


def check_table(spec: WeightSpec, name: str) -> None:
    """Raise HalfplateError unless `spec` is a core without other parts, whose rows can be decoded one by one."""
    if len(spec.classes) > 1 or spec.lender is not None:
        raise HalfplateError(
            f"quantization_config.modules[{name!r}] describes an embedding with wrappers or other parts, expected a core alone; write the checkpoint again"
        )


def embedding_scale(module: nn.Module) -> float | None:
    """The factor that `module` multiplies its rows by; None if it is not an embedding, or does more than that."""
    if not isinstance(module, nn.Embedding) or module._parameters.keys() != {"weight"} or module.max_norm is not None:
        return None
    if any(name != SCALE for name in module._buffers):
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, f"scalar_{SCALE}", None)
    if scale is None and isinstance(found := getattr(module, SCALE, None), Tensor) and not found.is_meta:
        scale = float(found)
    return float(scale) if isinstance(scale, int | float) and _only_scales(module, float(scale)) else None


@torch.no_grad()
def _only_scales(module: nn.Embedding, scale: float) -> bool:
    """Run the forward of the class of `module` with another, small table in place of its own."""
    table = torch.arange(24, dtype=torch.float32, device="cpu").cos().view(6, 4)
    ids = torch.tensor([[1, 5], [0, 2]], dtype=torch.int64, device="cpu")
    try:
        found = type(module).forward(_with_table(module, table, scale), ids)
    # The forward of another class fails in ways of its own on what it does not expect.
    except Exception:
        return False
    return isinstance(found, Tensor) and torch.allclose(found, table[ids] * scale, atol=1e-5)


def _with_table(module: nn.Embedding, table: Tensor, scale: float) -> nn.Embedding:
    """A copy of `module` with another table."""
    other: Any = type(module).__new__(type(module))
    other.__dict__.update(module.__dict__)
    other._parameters = {"weight": nn.Parameter(table, requires_grad=False)}
    other._buffers = {name: torch.tensor(scale, dtype=torch.float32, device=table.device) for name in module._buffers}
    if table.ndim == 2:
        other.num_embeddings, other.embedding_dim = table.shape
    copied: nn.Embedding = other
    return copied
