"""Decoding several sequences natively for text that a model samples from itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.formats.plain import is_plain_linear
from halfplate.headroom import available_memory, memory
from halfplate.kernels import native
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.decoder import why_not
from halfplate.runtime.native_step import NativeDecoder

# Copies of the weights in kernel layout may take this share of the free memory.
MOST_OF_MEMORY = 0.25


class NativeSampling:
    """The native step over the linears of a model in kernel layout, each as `pack` returns it.

    cache_dtype: of keys and values, fp32 or bf16.
    """

    def __init__(self, model: Any, seq_len: int, pack: Callable[[Any], PackedLinear]) -> None:
        self._decoder = NativeDecoder(model, pack)
        traits = self._decoder.traits
        self._blocks, self._heads = len(traits.layers), traits.kv_heads
        self._seq_len, self.width = seq_len, traits.head_dim
        self.cache_dtype = torch.float32

    @property
    def path(self) -> str:
        kept = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.cache_dtype]
        return f"native {native.isa()} step, cache in {kept}"

    def start(self, sequences: int) -> Callable[[Tensor], Tensor]:
        """Begin `sequences` sequences."""
        cache = GrowingCache.with_room(
            self._blocks, sequences, self._heads, self._seq_len, self.width, self.cache_dtype
        )
        return lambda current: self._decoder.step_batch(current.contiguous(), cache)


def native_sampling(model: Any, seq_len: int) -> NativeSampling | str:
    """A native decoding of `model` for sequences of `seq_len` tokens, or why there is none.

    Weights keep their values: linears that are not in kernel layout are copied, in bf16 if that is exact, else in fp32. If all
    weights are in bf16, so are keys and values, because reading them takes a third of the time.
    """
    if not native.available():
        return native.reason()
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    reason = why_not(model, lambda linear: isinstance(linear, PackedLinear) or is_plain_linear(linear))
    if reason is not None:
        return reason
    plain = [module for module in model.modules() if is_plain_linear(module)]
    copied = torch.float32.itemsize * sum(linear.out_features * linear.in_features for linear in plain)
    usable = available_memory()
    if usable is not None and copied > MOST_OF_MEMORY * (usable - (memory("VmRSS") or 0)):
        return "there is too little memory for a copy of the weights"
    kinds = set[str]()

    def pack(linear: nn.Module) -> PackedLinear:
        packed = linear if isinstance(linear, PackedLinear) else PackedLinear.of_dense(linear)  # type: ignore[arg-type]
        kinds.add(packed.spec.core_dtype)
        return packed

    sampling = NativeSampling(model, seq_len, pack)
    if kinds == {"bf16"} and sampling.width % 16 == 0:
        sampling.cache_dtype = torch.bfloat16
    return sampling
