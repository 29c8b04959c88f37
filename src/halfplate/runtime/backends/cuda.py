"""2:4 cores on a CUDA device, through torch's semi-structured matrix products (cuSPARSELt or CUTLASS)."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.formats import CompressedLinear, InWrapper, OutWrapper
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.kernels.capability import (
    CORE,
    NO_ORDER,
    NO_PARTS,
    NO_RANK,
    SCALES,
    WRAPPERS,
    Capability,
    anything,
    one_of,
    pattern_of,
)
from halfplate.runtime.backends.base import Backend, CannotPack, Options, Packed

# Sparse tensor cores exist since Ampere.
OLDEST_CAPABILITY = (8, 0)
Pack = Callable[[Tensor], Tensor]
SEMI_STRUCTURED = Capability(
    {
        "d_out": anything(),
        "d_in": anything(),
        "pattern": pattern_of(("2:4",), "semi-structured products are for pattern 2:4, not {value}", "--pattern 2:4"),
        "core_dtype": one_of(
            "core_dtype",
            ("bf16", "fp16", *QUANTIZERS.own),
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
        "group": anything(),  # scales and minima are applied when the core is packed
        "in_shared": anything(),  # the wrapper is packed along
        "same_as": anything(),  # all tensors are packed along
        "parts": NO_PARTS,
    },
    frozenset(CORE + SCALES + WRAPPERS),
)


class SemiStructuredLinear(Packed):
    """y = x (A S B)ᵀ + bias, with S as a semi-structured matrix of torch, and wrappers as batched products.

    The stored tensors are kept in CPU memory, because the products round codes and wrappers, so they could not be recovered.
    Gradients flow to inputs but not to the weight.

    module: the compressed linear that it replaces; it is not changed.
    product_dtype: fp16 or bf16, in which all products are computed; inputs are cast to it, and outputs back.
    pack: converts the full 2:4 matrix (d_out, d_in) to the form that torch's `linear` multiplies with.
    """

    core: Tensor
    added: Tensor | None

    def __init__(self, module: CompressedLinear, product_dtype: torch.dtype, pack: Pack) -> None:
        super().__init__(module.spec, None if module.bias is None else module.bias.dtype, module.dtype)
        self.product_dtype = product_dtype
        matrix = module.matrix
        # torch can only pack a full matrix, so values and positions are expanded for a moment.
        self.register_buffer("core", pack(matrix.core.dense(product_dtype).contiguous()), persistent=False)
        for side, wrapper in (("out", matrix.part(OutWrapper)), ("in", matrix.part(InWrapper))):
            parts = (None, None) if wrapper is None else wrapper.floats(product_dtype)
            self.register_buffer(f"{side}_blocks", parts[0], persistent=False)
            self.register_buffer(f"{side}_tail", parts[1], persistent=False)
        self.register_buffer("added", None if module.bias is None else module.bias.detach(), persistent=False)
        self._held = {name: tensor.detach().cpu() for name, tensor in module.tensors().items()}

    @property
    def path(self) -> str:
        return "semi-structured products of torch"

    @property
    def device(self) -> torch.device:
        return self.core.device

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._held)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out) in the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).to(self.product_dtype)
        rows = self._wrapped("in", rows)
        # torch's products have no gradient.
        core = self.core.to_dense() if torch.is_grad_enabled() and rows.requires_grad else self.core
        # torch's products do not support an empty batch.
        product = functional.linear(rows, core) if len(rows) else rows.new_empty(0, self.out_features)
        y = self._wrapped("out", product).to(x.dtype)
        if self.added is not None:
            y = y + self.added.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _wrapped(self, side: str, rows: Tensor) -> Tensor:
        """rows (tokens, d) multiplied by the wrapper of `side`: one batched product over its blocks."""
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


class SemiStructuredProducts(Backend):
    """torch's semi-structured products: fp16 and bf16 cores are multiplied in their own type, integer cores in bf16."""

    name = "semi-structured products of torch"
    devices = frozenset({"cuda"})
    capability = SEMI_STRUCTURED

    def unavailable(self, device: torch.device) -> str | None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            found, needed = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
            return f"compute capability {found} has no sparse tensor cores, which need {needed}"
        return None

    def _pack(self, linear: CompressedLinear, options: Options) -> Packed:
        dtype = torch.float16 if linear.spec.core_dtype == "fp16" else torch.bfloat16
        refusals = []
        for library, pack in (
            ("cuSPARSELt or torch's choice", torch.sparse.to_sparse_semi_structured),
            ("CUTLASS", _cutlass),
        ):
            try:
                return _tried(linear, dtype, pack)
            # Support depends on the build of torch, the driver and the shape, and failures raise various exceptions.
            except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
                refusals.append(f"{library}: {str(error).partition(chr(10))[0]}")
        raise CannotPack(f"torch has no semi-structured product for it ({'; '.join(refusals)})")


SEMI_STRUCTURED_PRODUCTS = SemiStructuredProducts()


def _tried(module: CompressedLinear, dtype: torch.dtype, pack: Pack) -> SemiStructuredLinear:
    """Prepare and run once, because a missing library is only noticed by the first product."""
    with warnings.catch_warnings():
        # torch warns once per process that these products are a prototype.
        warnings.simplefilter("ignore", UserWarning)
        prepared = SemiStructuredLinear(module, dtype, pack)
        with torch.inference_mode():
            prepared(torch.zeros(1, module.in_features, dtype=dtype, device=module.weight.device))
    return prepared


def _cutlass(dense: Tensor) -> Tensor:
    packed: Tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(dense)
    return packed
