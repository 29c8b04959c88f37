"""An embedding that is stored in bf16 and read in the type of the model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class StoredEmbedding(nn.Module):
    """Rows of a table that is exact in bf16, cast to `dtype` when they are read.

    The state dictionary holds the table in `dtype`, as the original `nn.Embedding` does.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        # Not a parameter, because transformers would use its type as that of the model.
        self.register_buffer("weight", weight)

    @classmethod
    def of(cls, module: nn.Embedding) -> "StoredEmbedding | None":
        """`module` in bf16; None if that would round values or not be smaller."""
        weight = module.weight.detach()
        half = weight.to(torch.bfloat16)
        if weight.dtype.itemsize <= 2 or not torch.equal(half.to(weight.dtype), weight):
            return None
        return cls(half, weight.dtype)

    def restored(self) -> nn.Embedding:
        """The original `nn.Embedding`."""
        module = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        module.weight = nn.Parameter(self.weight.to(self.dtype), requires_grad=False)
        return module

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to rows (..., embedding_dim)."""
        return functional.embedding(ids, self.weight).to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.to(self.dtype)
