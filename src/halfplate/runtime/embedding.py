"""An embedding that is kept in bf16 and read in the type of the model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class StoredEmbedding(nn.Module):
    """Rows of a table whose every number bf16 holds exactly, cast to `dtype` when they are looked up.

    The state dictionary holds the table in `dtype`, as the `nn.Embedding` it stands for does.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        # No parameter: transformers would take its type for that of the model.
        self.register_buffer("weight", weight)

    @classmethod
    def of(cls, module: nn.Embedding) -> "StoredEmbedding | None":
        """`module` in bf16, None if that would round or not be smaller."""
        weight = module.weight.detach()
        half = weight.to(torch.bfloat16)
        if weight.dtype.itemsize <= 2 or not torch.equal(half.to(weight.dtype), weight):
            return None
        return cls(half, weight.dtype)

    def restored(self) -> nn.Embedding:
        """The module that this one stands for."""
        module = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        module.weight = nn.Parameter(self.weight.to(self.dtype), requires_grad=False)
        return module

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to rows (..., embedding_dim)."""
        return functional.embedding(ids, self.weight).to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.to(self.dtype)
