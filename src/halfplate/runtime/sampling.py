"""Decoding several sequences natively for text that a model samples from itself."""

from typing import Any

import torch
from torch import Tensor, nn

from halfplate.formats.plain import is_plain_linear
from halfplate.headroom import available_memory, memory
from halfplate.kernels import native
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.decoder import NativeDecoder, why_not

# Copies of the weights in kernel layout may take this share of the free memory.
MOST_OF_MEMORY = 0.25


class NativeSampling:
    """The native step over a model whose linears are in kernel layout, or over a copy of its linears in kernel layout.

    The copy is exact: in bf16 if that loses nothing, else in fp32.
    """

    def __init__(self, model: Any, seq_len: int) -> None:
        self._config, self._seq_len = model.config, seq_len
        self._decoder = NativeDecoder(model, _packed)
        self._shape = (model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim)
        self.path = f"native {native.isa()} step"

    def start(self, sequences: int) -> Any:
        heads, width = self._shape
        cache = GrowingCache.with_room(self._config.num_hidden_layers, sequences, heads, self._seq_len, width)

        def step(current: Tensor) -> Tensor:
            return self._decoder.step_batch(current.contiguous(), cache)

        return step


def native_sampling(model: Any, seq_len: int) -> NativeSampling | str:
    """A native decoding of `model` for sequences of `seq_len` tokens, or why there is none."""
    if not native.available():
        return native.reason()
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    reason = why_not(model, lambda linear: isinstance(linear, PackedLinear) or is_plain_linear(linear))
    if reason is not None:
        return reason
    usable = available_memory()
    copied = 4 * sum(module.weight.numel() for module in model.modules() if is_plain_linear(module))
    if usable is not None and copied > MOST_OF_MEMORY * (usable - (memory("VmRSS") or 0)):
        return "there is too little memory for a copy of the weights"
    return NativeSampling(model, seq_len)


def _packed(linear: nn.Module) -> PackedLinear:
    return linear if isinstance(linear, PackedLinear) else PackedLinear.of_dense(linear)  # type: ignore[arg-type]
