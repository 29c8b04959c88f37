"""Random stored linears of any shape, and what they stand for in fp64, by indexing alone."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"int6": 6, "int5": 5, "nl5": 5, "int4": 4, "nl4": 4, "int3": 3, "nl3": 3, "int2": 2}
NL5 = [-127, -108, -94, -84, -75, -67, -60, -54, -48, -41, -35, -29, -24, -18, -12, -6]
NL5 += [0, 6, 12, 18, 24, 30, 36, 42, 48, 55, 61, 69, 78, 89, 102, 122]
TABLES = {
    "nl5": NL5,
    "nl4": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    "nl3": [-127, -78, -45, -18, 8, 36, 70, 119],
}
# Both positions of a group of 4 as its 4 bits of the index.
PAIRS = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8)


def random_linear(spec: Any, seed: int = 0) -> dict[str, Tensor]:
    """Valid stored tensors for `spec.layout()`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in spec.layout().items():
        if name == "weight_index":
            groups = PAIRS[torch.randint(6, (spec.d_out, spec.d_in // 4), generator=generator)]
            groups = torch.nn.functional.pad(groups, (0, groups.shape[1] % 2))
            tensors[name] = groups[:, ::2] | groups[:, 1::2] << 4
        elif name.endswith("scales"):
            tensors[name] = (torch.rand(shape, generator=generator) * 0.1 + 0.001).half()
        elif dtype == torch.int8:
            tensors[name] = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        elif dtype == torch.uint8:
            low = 1 if spec.core_dtype == "int8" else 0
            tensors[name] = torch.randint(low, 256, shape, generator=generator).to(torch.uint8)
            used = kept_of(spec) * BITS.get(spec.core_dtype, 8) % 8
            if used:
                tensors[name][..., -1] &= (1 << used) - 1
        else:
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def kept_of(spec: Any) -> int:
    return int(spec.d_in) if str(spec.pattern) == "dense" else spec.d_in // 2


def factors(spec: Any, tensors: dict[str, Tensor]) -> SimpleNamespace:
    """A, S and B in fp64."""
    return SimpleNamespace(
        out=_wrapper(spec.d_out, spec.out_block, "out", tensors),
        core=_core(spec, tensors),
        into=_wrapper(spec.d_in, spec.in_block, "in", tensors),
    )


def _core(spec: Any, tensors: dict[str, Tensor]) -> Tensor:
    kept, weight = kept_of(spec), tensors["weight"].reshape(spec.d_out, -1)
    if spec.core_dtype == "int8":
        values = weight.double() - 128
    elif spec.core_dtype in BITS:
        width = BITS[spec.core_dtype]
        stream = torch.stack([weight >> k & 1 for k in range(8)], -1).reshape(spec.d_out, -1)[:, : kept * width]
        places = 2 ** torch.arange(width, dtype=torch.float64)
        codes = (stream.reshape(spec.d_out, kept, width) * places).sum(-1)
        table = TABLES.get(spec.core_dtype)
        values = codes - 2 ** (width - 1) if table is None else torch.tensor(table, dtype=torch.float64)[codes.long()]
    else:
        values = weight.double()
    columns = torch.arange(kept).expand(spec.d_out, -1)
    if "weight_index" in tensors:
        index = tensors["weight_index"]
        positions = torch.stack([index >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(spec.d_out, -1)[:, :kept]
        columns = columns // 2 * 4 + positions
    if "weight_scales" in tensors:
        values = values * tensors["weight_scales"].double().gather(1, columns // spec.group)
    return torch.zeros(spec.d_out, spec.d_in, dtype=torch.float64).scatter(1, columns, values)


def _wrapper(size: int, block: int, side: str, tensors: dict[str, Tensor]) -> Tensor:
    if not block:
        return torch.eye(size, dtype=torch.float64)
    parts = [*tensors.get(f"weight_{side}_blocks", [])] + [
        part for name, part in tensors.items() if name == f"weight_{side}_tail"
    ]
    matrix = torch.block_diag(*[part.double() for part in parts])
    scales = tensors.get(f"weight_{side}_scales")
    return matrix if scales is None else matrix * scales.double()[:, None]
