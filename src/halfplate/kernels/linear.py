"""Compressed linears in kernel layout: packing, unpacking and multiplying, on plain tensors.

A packed linear is one uint8 tensor: a header (`Packed` in src/runtime.h) and the parts that it points to (src/layout.h).
The layout is the same for every instruction set, but it is not a file format and changes with the kernels.
"""

import ctypes
import mmap
from collections.abc import Mapping
from contextlib import suppress
from threading import local

import torch
from torch import Tensor
from torch.nn import functional

from halfplate.dtypes import STORED as STORED_DTYPES
from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS, scaled_core_dtypes
from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native
from halfplate.kernels.capability import (
    CORE,
    NO_ORDER,
    NO_PARTS,
    NO_RANK,
    SCALES,
    WRAPPERS,
    Capability,
    anything,
    check_tensors,
    one_of,
    pattern_of,
)
from halfplate.kernels.kinds import kernel_spec, kind_of, numbers_of, recoded
from halfplate.kernels.scales import plain_scales, with_stored_scales
from halfplate.precision import has_tiles, multiplies_bf16

TILE = 128  # columns of a tile, as in src/runtime.h
GROUPS = (32, 64, TILE)  # columns of a scale
WRAPPER_KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3}
PATTERNS = ("2:4", "dense")
CORES = (*STORED_DTYPES, *scaled_core_dtypes())
ACTIVATIONS = ("auto", "float", "int8")
FLOAT, BYTES, MANY_BYTES = range(3)  # halfplate::Activations
# From this many tokens on, the core is expanded and multiplied by torch's matrix product: for 2:4 cores, which do half the work, and
# for unpruned ones. Measured (RESULTS.md).
EXPAND_FROM = {"avx512": (128, 48), "avx2": (96, 24), "baseline": (16, 16)}
# From this many tokens on, the inputs of `auto` are rounded to int8: for 2:4 cores, which take longer to lay out, and for unpruned ones; as in
# kernels/src/byte_panel.inc. Measured (RESULTS.md).
BYTES_FROM = (16, 4)
CPU = torch.device("cpu")
LARGE = 4 * 2**20  # bytes; smaller tensors would leave large pages mostly empty
REFUSALS = {
    1: "positions that do not increase within their group or padding that is not 0",
    2: "NaN or inf, expected finite values",
    3: "codes outside the range of their type or scales below 0",
}


NATIVE = Capability(
    {
        "d_out": anything(),
        "d_in": anything(),
        "pattern": pattern_of(PATTERNS, "no kernel for pattern {value}", "--pattern 2:4"),
        "core_dtype": one_of(
            "core_dtype",
            CORES,
            "no kernel for core_dtype={value!r}",
            "--core-dtype int8",
        ),
        "out_block": anything(),
        "in_block": anything(),
        "wrapper_dtype": one_of(
            "wrapper_dtype",
            WRAPPER_KINDS,
            "no kernel for wrapper_dtype={value!r}",
            "--wrapper-dtype bf16",
        ),
        "rank": NO_RANK,
        "permuted": NO_ORDER,
        "group": one_of("group", GROUPS, "no kernel for groups of {value} columns", "--group-size 32"),
        "in_shared": anything(),  # the wrapper is packed along
        "same_as": anything(),  # all tensors are packed along
        "parts": NO_PARTS,
    },
    frozenset(CORE + SCALES + WRAPPERS),
)


class Header(ctypes.Structure):
    """Mirror of `halfplate::Packed` in src/runtime.h."""

    _fields_ = [
        ("magic", ctypes.c_uint64),
        *[(name, ctypes.c_int64) for name in ("d_out", "d_in")],
        *[(name, ctypes.c_int32) for name in ("kind", "sparse", "activations", "wrapper_kind")],
        *[(name, ctypes.c_int64) for name in ("out_block", "in_block", "group")],
        ("table", ctypes.c_int8 * 32),
        *[(name, ctypes.c_int64) for name in ("core", "scales", "in_blocks", "in_scales")],
        *[(name, ctypes.c_int64) for name in ("out_blocks", "out_scales", "bias", "nbytes")],
    ]


STORED = (
    ("weight", "weight"),
    ("index", "weight_index"),
    ("scales", "weight_scales"),
    ("out_blocks", "weight_out_blocks"),
    ("out_tail", "weight_out_tail"),
    ("out_scales", "weight_out_scales"),
    ("in_blocks", "weight_in_blocks"),
    ("in_tail", "weight_in_tail"),
    ("in_scales", "weight_in_scales"),
    ("bias", "bias"),
)


class Stored(ctypes.Structure):
    """Mirror of `halfplate::Stored` in src/runtime.h."""

    _fields_ = [*[(name, ctypes.c_void_p) for name, _ in STORED], ("bytes", ctypes.c_int64 * len(STORED))]


def kernels_for() -> str:
    """Which matrices have a kernel, as text."""
    return f"{' or '.join(PATTERNS)}; cores {', '.join(CORES)}; wrappers {', '.join(WRAPPER_KINDS)}"


def header_of(spec: WeightSpec, activations: str, bias: bool) -> Header:
    """The header of a matrix of `spec`, with offsets; int8 activations are only for quantised cores."""
    inputs = inputs_of(activations) if spec.core_dtype in QUANTIZERS else FLOAT
    kind = kind_of(spec, inputs == BYTES)
    header = Header(
        d_out=spec.d_out,
        d_in=spec.d_in,
        kind=kind,
        sparse=int(str(spec.pattern) != "dense"),
        activations=inputs,
        wrapper_kind=WRAPPER_KINDS[spec.wrapper_dtype],
        out_block=spec.out_block,
        in_block=spec.in_block,
        group=TILE if spec.core_dtype in STORED_DTYPES else spec.group,
    )
    for number, value in numbers_of(spec, kind).items():
        header.table[number] = value
    native.check(native.library().halfplate_place(ctypes.byref(header), int(bias)), "layout")
    return header


def pack(
    spec: WeightSpec, tensors: Mapping[str, Tensor], activations: str = "float", bias: Tensor | None = None
) -> Tensor:
    """Pack the stored `tensors` of a matrix, named as in `spec.layout()`, into one uint8 tensor.

    activations: `float`; or for cores on a grid `int8`, or `auto` (`inputs_of`). Codes take the bits of the next wider kind: 4, 8, or 5 (`kind_of`). bias: (d_out,) of any floating type. Raises HalfplateError
    for tensors of other shapes or types than `spec` says, and for values that no writer leaves: NaN, inf, positions that do
    not rise within a group, codes out of range.
    """
    if (refusal := NATIVE.refusal(spec)) is not None:
        raise HalfplateError(refusal.reason)
    check_tensors(spec, tensors)
    for name, (shape, dtype) in spec.layout().items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype or found.device.type != "cpu":
            raise HalfplateError(
                f"{name} is {found.dtype} {tuple(found.shape)} on {found.device}, expected {dtype} {shape} on cpu"
            )
    if bias is not None and (tuple(bias.shape) != (spec.d_out,) or not bias.is_cpu):
        raise HalfplateError(f"bias is {tuple(bias.shape)} on {bias.device}, expected {(spec.d_out,)} on cpu")
    header = header_of(spec, activations, bias is not None)
    packed = _aligned(header.nbytes)
    ctypes.memmove(packed.data_ptr(), ctypes.byref(header), ctypes.sizeof(header))
    held = {name: tensors[name].detach().contiguous() for name in spec.layout()}
    held["weight"] = recoded(held["weight"], spec, spec.core_dtype, kernel_spec(spec, header.kind).core_dtype)
    held |= plain_scales(spec, held)
    if bias is not None:
        held["bias"] = bias.detach().to(torch.float32).contiguous()
    reason = native.library().halfplate_pack(
        packed.data_ptr(), packed.numel(), ctypes.byref(_stored(held)), torch.get_num_threads()
    )
    native.check(reason, "packing")
    if reason:
        raise HalfplateError(
            f"the matrix holds {REFUSALS.get(reason, 'values of several kinds that no writer leaves')}; the file is damaged, write it again"
        )
    return packed


def unpack(spec: WeightSpec, packed: Tensor) -> dict[str, Tensor]:
    """The stored tensors that were packed, bit for bit if super-scales are those that Halfplate writes; a bias is returned as fp32."""
    header = read_header(packed)
    held_spec = kernel_spec(spec, header.kind)
    layout = held_spec.layout()
    tensors = {name: torch.zeros(shape, dtype=dtype, device=CPU) for name, (shape, dtype) in layout.items()}
    if header.bias:
        tensors["bias"] = torch.empty(spec.d_out, dtype=torch.float32, device=CPU)
    status = native.library().halfplate_unpack(
        packed.data_ptr(), packed.numel(), ctypes.byref(_stored(tensors)), torch.get_num_threads()
    )
    native.check(status, "unpacking")
    tensors["weight"] = recoded(tensors["weight"], spec, held_spec.core_dtype, spec.core_dtype)
    return with_stored_scales(spec, tensors)


def read_header(packed: Tensor) -> Header:
    """The header of a packed linear; raises HalfplateError for a tensor that cannot hold one."""
    if packed.dtype != torch.uint8 or not packed.is_cpu or packed.numel() < ctypes.sizeof(Header):
        raise HalfplateError(
            f"packed is {packed.dtype} of {packed.numel()} on {packed.device}, expected a packed matrix: uint8 on cpu; load the model again"
        )
    return Header.from_address(packed.data_ptr())


def multiply(x: Tensor, packed: Tensor, d_out: int) -> Tensor:
    """x (..., d_in) of fp32, bf16 or fp16 times the transpose of a packed matrix: (..., d_out) in the dtype of `x`.

    Sums are fp32, or exact integers times fp32 scales with int8 activations. NaN and inf in `x` propagate to every output that a
    kept weight connects to them. If the core is expanded (many tokens) or activations are int8, they propagate to every output of
    their token.
    """
    header = read_header(packed)
    if not x.is_cpu or not x.is_floating_point():
        raise HalfplateError(
            f"x is {x.dtype} on {x.device}, expected floating point on cpu; move the input to the model"
        )
    if x.shape[-1] != header.d_in or header.d_out != d_out or header.nbytes != packed.numel():
        raise HalfplateError(
            f"x has {x.shape[-1]} columns for {d_out} outputs, expected {header.d_in} and {header.d_out}; pass the matrix's own input"
        )
    rows = x.reshape(-1, header.d_in)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], d_out)
    if expands(header, tokens):
        return _multiply_expanded(rows, packed, header).view(*x.shape[:-1], d_out)
    rows = _floats(rows)
    y = torch.empty(tokens, d_out, dtype=torch.float32, device=CPU)
    status = native.library().halfplate_linear(
        packed.data_ptr(),
        packed.numel(),
        rows.data_ptr(),
        *_extent(rows),
        y.data_ptr(),
        y.nbytes,
        tokens,
        torch.get_num_threads(),
    )
    if status:
        native.check(status, f"linear of {tokens} tokens")
    return (y if x.dtype == torch.float32 else y.to(x.dtype)).view(*x.shape[:-1], d_out)


def inputs_of(activations: str) -> int:
    """How the kernels of this machine take activations that are `auto`, `float` or `int8`.

    `auto` rounds those of many tokens to int8 where products of int8 are the fastest: with AVX-512 VNNI, and without tiles for bf16.
    """
    if activations == "auto":
        return MANY_BYTES if multiplies_bytes() else FLOAT
    return BYTES if activations == "int8" else FLOAT


def taken_activations(activations: str) -> str:
    """How the kernels of this machine take the activations of a prompt, in words."""
    sparse, dense = BYTES_FROM
    return ("float", "int8", f"int8 for {dense} tokens or more, {sparse} in 2:4 cores")[inputs_of(activations)]


def multiplies_bytes() -> bool:
    """Whether int8 is the fastest type of the matrix products of this machine."""
    return native.available() and native.isa() == "avx512" and not has_tiles()


def takes_bytes(header: Header, tokens: int) -> bool:
    """Whether a matrix takes this many tokens as int8; as in kernels/src/byte_panel.inc."""
    if header.activations != MANY_BYTES:
        return bool(header.activations == BYTES)
    return tokens >= bytes_from(bool(header.sparse)) and native.isa() == "avx512"


def bytes_from(sparse: bool) -> int:
    """From how many tokens on a core, 2:4 or unpruned, takes the inputs of `auto` as int8, on processors where it does."""
    return BYTES_FROM[0 if sparse else 1]


def expands(header: Header, tokens: int) -> bool:
    """Whether `multiply` expands the core for this many tokens."""
    return tokens >= expand_from(bool(header.sparse)) and not takes_bytes(header, tokens)


def expand_from(sparse: bool) -> int:
    """From how many tokens on the dense product of torch is faster for a core, 2:4 or unpruned."""
    return EXPAND_FROM[native.isa()][0 if sparse else 1]


def _multiply_expanded(rows: Tensor, packed: Tensor, header: Header) -> Tensor:
    """`rows` (tokens, d_in) times the core, expanded to a full matrix in a reused scratch buffer."""
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 and multiplies_bf16("cpu") else torch.float32
    core = _scratch(header.d_out * header.d_in, dtype).view(header.d_out, header.d_in)
    status = native.library().halfplate_expand(
        packed.data_ptr(),
        packed.numel(),
        core.data_ptr(),
        core.nbytes,
        int(dtype == torch.bfloat16),
        torch.get_num_threads(),
    )
    native.check(status, "expansion of the core")
    y = _floats(rows)
    if header.in_block:
        y = _wrapped(packed, y, False, header.d_in)
    # Autocast would choose a different type than that of the buffers.
    with torch.autocast("cpu", enabled=False):
        y = functional.linear(y.to(dtype), core)
    if header.out_block:
        y = _wrapped(packed, _floats(y), True, header.d_out)
    if header.bias:
        start = packed.data_ptr() + header.bias
        y = y + torch.frombuffer((ctypes.c_float * header.d_out).from_address(start), dtype=torch.float32)
    return y.to(rows.dtype)


def _wrapped(packed: Tensor, x: Tensor, out_side: bool, width: int) -> Tensor:
    y = torch.empty(x.shape[0], width, dtype=torch.float32, device=CPU)
    status = native.library().halfplate_wrap(
        packed.data_ptr(),
        packed.numel(),
        int(out_side),
        x.data_ptr(),
        *_extent(x),
        y.data_ptr(),
        y.nbytes,
        x.shape[0],
        torch.get_num_threads(),
    )
    native.check(status, "wrapper")
    return y


def _extent(rows: Tensor) -> tuple[int, int]:
    """Bytes from the first to the end of the last value of `rows` (tokens, d), and the distance between rows in values."""
    tokens, width = rows.shape
    apart = rows.stride(0) if tokens > 1 else width
    return ((tokens - 1) * apart + width) * rows.element_size(), apart


def _floats(rows: Tensor) -> Tensor:
    """`rows` (tokens, d) as fp32 with contiguous columns."""
    rows = rows.detach().to(torch.float32)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class _Kept(local):
    """The expanded core of the last matrix of this thread, because allocating new pages would cost more than filling them."""

    buffers: dict[torch.dtype, Tensor]

    def __init__(self) -> None:
        self.buffers = {}


_kept = _Kept()


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    kept = _kept.buffers.get(dtype)
    if kept is None or kept.numel() < count:
        kept = _kept.buffers[dtype] = torch.empty(count, dtype=dtype, device=CPU)
    return kept[:count]


def _aligned(nbytes: int) -> Tensor:
    """An uninitialised uint8 tensor whose data is aligned to 64 bytes, in large pages if it is large enough."""
    if nbytes >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Large pages avoid a thousand page faults when it is filled, and TLB misses when it is read.
        pages = mmap.mmap(-1, nbytes)
        with suppress(OSError):  # a system without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8)
    room = torch.empty(nbytes + 64, dtype=torch.uint8, device=CPU)
    start = -room.data_ptr() % 64
    return room[start : start + nbytes]


def _stored(tensors: Mapping[str, Tensor]) -> Stored:
    stored = Stored()
    for place, (field, name) in enumerate(STORED):
        if name in tensors:
            setattr(stored, field, tensors[name].data_ptr())
            stored.bytes[place] = tensors[name].nbytes
    return stored
