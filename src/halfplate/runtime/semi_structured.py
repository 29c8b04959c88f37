"""2:4 cores on a CUDA device, through the semi-structured products of torch (cuSPARSELt or CUTLASS)."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.kernels.capability import NO_ORDER, NO_RANK, Backend, anything, check_tensors, one_of, pattern_of

# Sparse tensor cores came with Ampere.
OLDEST_CAPABILITY = (8, 0)
Pack = Callable[[Tensor], Tensor]
SEMI_STRUCTURED = Backend(
    "semi-structured products of torch",
    {
        "d_out": anything(),
        "d_in": anything(),
        "pattern": pattern_of(("2:4",), "semi-structured products are for pattern 2:4, not {value}", "--pattern 2:4"),
        "core_dtype": one_of(
            "core_dtype",
            ("bf16", "fp16", "int8", "int4", "int3", "int2"),
            "semi-structured products of torch take no core of type {value} and pattern 2:4; compress with core_dtype='bf16'",
            "--core-dtype bf16",
        ),
        "out_block": anything(),
        "in_block": anything(),
        "wrapper_dtype": one_of(
            "wrapper_dtype",
            ("fp32", "bf16", "fp16", "int8"),
            "semi-structured products have no wrapper_dtype={value!r}",
            "--wrapper-dtype bf16",
        ),
        "rank": NO_RANK,
        "permuted": NO_ORDER,
        "group": anything(),  # scales are multiplied in when the core is packed
        "in_shared": anything(),
    },
)


class SemiStructuredLinear(nn.Module):
    """y = x (A S B)ᵀ + bias with S in the form of torch's semi-structured products and wrappers by batched products.

    module: the compressed linear it takes the place of, which is left as it is. dtype: fp16 or bf16, in which all products
    are computed; inputs of another type are cast to it, outputs back. pack: turns the dense 2:4 matrix (d_out, d_in) into
    what `linear` of torch multiplies with.
    """

    core: Tensor
    bias: Tensor | None

    def __init__(self, module: CompressedLinear, dtype: torch.dtype, pack: Pack) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = module.in_features, module.out_features, module.spec
        self.dtype = dtype
        matrix = module.matrix
        # Values and positions become one dense matrix for a moment: torch packs from nothing else.
        self.register_buffer("core", pack(matrix.core.dense(dtype).contiguous()), persistent=False)
        for side, wrapper in (("out", matrix.out_wrapper), ("in", matrix.in_wrapper)):
            parts = (None, None) if wrapper is None else wrapper.floats(dtype)
            self.register_buffer(f"{side}_blocks", parts[0], persistent=False)
            self.register_buffer(f"{side}_tail", parts[1], persistent=False)
        self.register_buffer("bias", None if module.bias is None else module.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out) in the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        rows = self._wrapped("in", rows)
        # The products of torch take no empty batch.
        product = functional.linear(rows, self.core) if len(rows) else rows.new_empty(0, self.out_features)
        y = self._wrapped("out", product).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _wrapped(self, side: str, rows: Tensor) -> Tensor:
        """rows (tokens, d) through the wrapper of `side`: one batched product over its blocks."""
        blocks, tail = getattr(self, f"{side}_blocks"), getattr(self, f"{side}_tail")
        outputs = []
        full = 0
        if blocks is not None:
            count, width = blocks.shape[:2]
            full = count * width
            grouped = rows[:, :full].view(-1, count, width).transpose(0, 1)  # (count, tokens, b)
            product = torch.bmm(grouped, blocks.transpose(1, 2))
            outputs.append(product.transpose(0, 1).reshape(-1, full))
        if tail is not None:
            outputs.append(rows[:, full:] @ tail.T)
        if not outputs:
            return rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise HalfplateError(
            f"{prefix.rstrip('.')} is packed for the GPU and cannot be saved; save a model loaded with kernels=False"
        )

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.dtype}"


def prepare(module: CompressedLinear) -> SemiStructuredLinear | str:
    """`module`, which is on a CUDA device, for torch's semi-structured products, or the reason why it stays as it is.

    fp16 and bf16 cores are multiplied in their own type, int8 and int4 cores in bf16.
    """
    reason = unsupported(module.spec) or _unsupported_device(module.weight.device)
    if reason is not None:
        return reason
    check_tensors(module.spec.alone, module.tensors())
    dtype = torch.float16 if module.spec.core_dtype == "fp16" else torch.bfloat16
    refusals = []
    for backend, pack in (
        ("cuSPARSELt or torch's choice", torch.sparse.to_sparse_semi_structured),
        ("CUTLASS", _cutlass),
    ):
        try:
            return _tried(module, dtype, pack)
        # What torch offers depends on its build, the driver and the shape, and each fails with errors of its own.
        except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
            refusals.append(f"{backend}: {str(error).partition(chr(10))[0]}")
    return f"torch has no semi-structured product for it ({'; '.join(refusals)})"


def unsupported(spec: WeightSpec) -> str | None:
    """Why no semi-structured product of torch can run a matrix of `spec` on any device; None where one may."""
    refusal = SEMI_STRUCTURED.refusal(spec)
    return None if refusal is None else refusal.reason


def _unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"semi-structured products need a CUDA device, not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
        return f"compute capability {found} has no sparse tensor cores, which need {needed}"
    return None


def _tried(module: CompressedLinear, dtype: torch.dtype, pack: Pack) -> SemiStructuredLinear:
    """Prepare and run once: a library that is missing is noticed only by its first product."""
    with warnings.catch_warnings():
        # torch calls these products a prototype, once in every process.
        warnings.simplefilter("ignore", UserWarning)
        prepared = SemiStructuredLinear(module, dtype, pack)
        with torch.inference_mode():
            prepared(torch.zeros(1, module.in_features, dtype=dtype, device=module.weight.device))
    return prepared


def _cutlass(dense: Tensor) -> Tensor:
    packed: Tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(dense)
    return packed
