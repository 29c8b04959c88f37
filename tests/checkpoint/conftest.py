"""A tiny model compressed by hand, and its checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from halfplate.checkpoint.write import write_checkpoint
from halfplate.formats import Chain, CompressedLinear, InWrapper, LowRank, NMSparse, OutWrapper, Permutation, WeightSpec
from halfplate.pattern import DENSE, Pattern
from halfplate.runtime import restore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IDS = torch.tensor([[1, 5, 7, 11, 30, 2, 90], [1, 3, 3, 8, 64, 100, 9]])

# Block sizes of 10 and 24 leave tails in some matrices, 64 is wider than all.
VARIETY: list[dict[str, Any]] = [
    {"pattern": Pattern(2, 4), "out_block": 10, "in_block": 24},
    {"pattern": Pattern(4, 8), "out_block": 64, "in_block": 64},
    {"pattern": Pattern(1, 8), "core_dtype": "fp16", "wrapper_dtype": "fp32", "out_block": 8, "in_block": 8},
    {"pattern": Pattern(2, 4), "core_dtype": "fp32", "rank": 6, "permuted": True},
    {"pattern": Pattern(1, 4), "wrapper_dtype": "fp16", "out_block": 1, "in_block": 1},
    {"pattern": Pattern(1, 2), "core_dtype": "affine4", "group": 64, "in_block": 4},
    {"pattern": Pattern(3, 16), "core_dtype": "affine3k", "group": 32, "out_block": 5},
    {"core_dtype": "int8", "out_block": 10, "in_block": 24},
    {"core_dtype": "int4", "out_block": 10, "in_block": 24, "wrapper_dtype": "int8"},
    {"pattern": DENSE, "core_dtype": "int8"},
    {"pattern": DENSE, "core_dtype": "int4", "in_block": 64, "wrapper_dtype": "int8"},
    {"pattern": Pattern(5, 16), "core_dtype": "int4", "out_block": 1, "in_block": 1, "wrapper_dtype": "int8"},
    {"pattern": DENSE, "core_dtype": "bf16"},
    {"pattern": Pattern(7, 16), "core_dtype": "int8", "permuted": True, "group": 32},
]


def compress_linear(linear: nn.Linear, options: dict[str, Any], seed: int) -> CompressedLinear:
    """Keep the largest values of each group, between wrappers near the identity."""
    spec = WeightSpec(linear.out_features, linear.in_features, **options)
    generator = torch.Generator().manual_seed(seed)
    weight = linear.weight.detach()
    groups = weight.abs().reshape(spec.d_out, -1, spec.pattern.m)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(spec.pattern.n).indices, True)
    core = NMSparse.from_dense(weight, mask.reshape(weight.shape), spec.pattern, spec.core_dtype, spec.group)
    wrappers = []
    for kind, size, block in ((OutWrapper, spec.d_out, spec.out_block), (InWrapper, spec.d_in, spec.in_block)):
        noise = 0.05 * torch.randn(-(-size // max(block, 1)), block, block, generator=generator)
        wrappers.append(kind.from_padded(torch.eye(block) + noise, size, block, spec.wrapper_dtype) if block else None)
    added = None
    if spec.rank:
        factors = (torch.randn(size, generator=generator) for size in ((spec.d_out, spec.rank), (spec.rank, spec.d_in)))
        added = LowRank.rounded(*factors, spec.wrapper_dtype)
    order = Permutation.of(torch.randperm(spec.d_in, generator=generator)) if spec.permuted else None
    return CompressedLinear.from_weight(Chain.of(spec, core, *wrappers, added, order), spec, linear.bias)


def compress_by_hand(model: PreTrainedModel, variety: Sequence[dict[str, Any]] = VARIETY) -> dict[str, WeightSpec]:
    """Replace every linear of the blocks in place, the k-th as `variety` says at k."""
    specs = {}
    linears = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    ]
    for k, (name, linear) in enumerate(linears):
        compressed = compress_linear(linear, variety[k % len(variety)], seed=k)
        model.set_submodule(name, compressed)
        specs[name] = compressed.spec
    return specs


@dataclass
class Written:
    """A model in memory, as it was written to `folder`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    specs: dict[str, WeightSpec]
    other_dtype: torch.dtype
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    def logits(self) -> Tensor:
        return logits(self.model)

    def write(self, out: Path, **options: Any) -> None:
        write_checkpoint(self.model, self.tokenizer, out, self.specs, self.record, self.other_dtype, **options)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def written(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerBase
) -> Callable[..., Written]:
    """The factory `written(architecture="llama", variety=VARIETY, other_dtype=bf16, max_shard_nbytes=..., **config)`."""

    def make(
        architecture: str = "llama",
        variety: Sequence[dict[str, Any]] = VARIETY,
        other_dtype: torch.dtype = torch.bfloat16,
        max_shard_nbytes: int = 10**9,
        **config: Any,
    ) -> Written:
        model = tiny_model(architecture, **({"vocab_size": len(tiny_tokenizer)} | config))
        specs = compress_by_hand(model, variety)
        record = {"matrices": {name: {"relative_error": 0.25} for name in specs}, "recipe": {"method": "magnitude"}}
        one = Written(model, tiny_tokenizer, specs, other_dtype, tmp_path / "out", record)
        one.write(one.folder, max_shard_nbytes=max_shard_nbytes)
        return one

    return make


@pytest.fixture
def logits_of() -> Callable[[Any], Tensor]:
    """Logits on the torch path, which sums in one order wherever it runs; what was packed is restored first."""

    def restored_logits(model: Any) -> Tensor:
        restore(model)
        return logits(model)

    return restored_logits


@pytest.fixture
def by_hand() -> Callable[..., dict[str, WeightSpec]]:
    return compress_by_hand
