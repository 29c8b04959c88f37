"""The compiled library, loaded with ctypes on first use.

`HALFPLATE_ISA` (baseline, avx2, avx512) forces an instruction set that the processor has, and others are refused; `HALFPLATE_NATIVE=0`
turns the library off, so that everything runs on its torch path.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from halfplate.errors import HalfplateError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LIBRARY = Path(__file__).with_name("libhalfplate.so")
# Mirror of `halfplate::Status` in src/checks.h.
NO_MEMORY = -1
STATUS = {
    -2: "the packed matrix is damaged or was packed by another version; load the model again",
    -3: "a buffer has another size or element type than the call needs; pass the tensors of this model",
    -4: "a size, a position or a number of threads is out of range; pass the tensors of this model",
}


class Problem(ctypes.Structure):
    """Mirror of `halfplate::Problem` in src/armor.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "out_blocks", "in_blocks", "moment", "core")],
        *[(name, ctypes.c_int64) for name in ("row_tiles", "row_tile", "col_tiles", "col_tile")],
        *[(name, ctypes.c_int64) for name in ("kept", "group", "threads")],
        ("bytes", ctypes.c_int64 * 5),
    ]


class GramSweep(ctypes.Structure):
    """Mirror of `halfplate::GramSweep` in src/armor.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("core", "error", "product", "out_gram", "in_gram", "table", "steps")],
        *[(name, ctypes.c_int64) for name in ("row_tiles", "row_tile", "cols", "kept", "group")],
        *[(name, ctypes.c_int64) for name in ("least", "greatest", "step_width", "off_grid", "threads")],
        ("bytes", ctypes.c_int64 * 7),
    ]


class Rows(ctypes.Structure):
    """Mirror of `halfplate::Rows` in src/armor.h."""

    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in ("wanted", "gram", "spread", "order", "table", "steps", "values", "losses")
        ],
        *[
            (name, ctypes.c_int64)
            for name in ("rows", "cols", "least", "greatest", "step_width", "rounds", "sweeps", "threads")
        ],
        ("bytes", ctypes.c_int64 * 8),
    ]


class AffineRows(ctypes.Structure):
    """Mirror of `halfplate::AffineRows` in src/armor.h."""

    _fields_ = [
        ("rows", Rows),
        *[(name, ctypes.c_void_p) for name in ("minima", "step_units", "minimum_units", "free_steps", "free_minima")],
        ("most", ctypes.c_int64),
        ("bytes", ctypes.c_int64 * 5),
    ]


def _absent() -> str:
    """Why there is no library to open; empty if there is one."""
    if os.environ.get("HALFPLATE_NATIVE") == "0":
        return "HALFPLATE_NATIVE=0 turns the native kernels off"
    if not LIBRARY.exists():
        return "the native kernels were not built; install a C++17 compiler and reinstall halfplate"
    return ""


def _unknown_isa(library: ctypes.CDLL) -> str:
    """What is wrong with HALFPLATE_ISA; empty if it names an instruction set that the processor has, or none."""
    forced = os.environ.get("HALFPLATE_ISA", "")
    library.halfplate_isas.restype = ctypes.c_char_p
    found = library.halfplate_isas().decode().split()
    if forced in ("", *found):
        return ""
    return f"HALFPLATE_ISA={forced} is not an instruction set that this processor has; expected one of {', '.join(found)}, or leave it unset"


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library and the name of its instruction set, or None and the reason."""
    absent = _absent()
    if absent:
        return None, absent
    import torch  # noqa: F401  (its OpenMP runtime must be the one in the process before ours asks for it)

    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"the native kernels cannot be loaded: {error}"
    if unknown := _unknown_isa(library):
        raise HalfplateError(unknown)
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    problem = ctypes.POINTER(Problem)
    for name, result, arguments in (
        ("isa", ctypes.c_char_p, []),
        ("output_moments", flag, [problem, pointer, pointer, integer, pointer, integer]),
        ("input_moments", flag, [problem, pointer, pointer, integer, pointer, integer]),
        ("sweep", flag, [problem, pointer, integer]),
        ("gram_sweep", flag, [ctypes.POINTER(GramSweep)]),
        ("rows", flag, [ctypes.POINTER(Rows)]),
        ("affine_rows", flag, [ctypes.POINTER(AffineRows)]),
        ("place", flag, [pointer, flag]),
        ("pack", flag, [pointer, integer, pointer, integer]),
        ("unpack", flag, [pointer, integer, pointer, integer]),
        ("linear", flag, [pointer, integer, pointer, integer, integer, pointer, integer, integer, integer]),
        (
            "group",
            flag,
            [pointer, *[integer] * 2, pointer, *[integer] * 4, pointer, *[integer] * 4],
        ),
        ("wrap", flag, [pointer, integer, flag, pointer, integer, integer, pointer, integer, integer, integer]),
        ("expand", flag, [pointer, integer, pointer, integer, flag, integer]),
        ("decoder_scratch", integer, [pointer, integer]),
        ("step", flag, [pointer, pointer, integer, integer, pointer, integer, integer]),
        ("step_batch", flag, [pointer, pointer, integer]),
        (
            "draw",
            flag,
            [pointer, integer, integer, integer, ctypes.c_float, pointer, integer, pointer, integer, integer],
        ),
        ("read", ctypes.c_float, [pointer, integer, integer]),
    ):
        function = getattr(library, f"halfplate_{name}")
        function.restype, function.argtypes = result, arguments
    return library, library.halfplate_isa().decode()


def available() -> bool:
    """Whether the native kernels can be used."""
    return _open()[0] is not None


def reason() -> str:
    """Why the native kernels cannot be used; empty if they can."""
    return "" if available() else _open()[1]


def isa() -> str:
    """Instruction set in use: `avx512`, `avx2`, `baseline`, or `none`."""
    return _open()[1] if available() else "none"


def described() -> str:
    """The instruction set, or why there is none, read from the library without further imports."""
    absent = _absent()
    if absent:
        return absent
    torch = find_spec("torch")
    try:
        # Wheels do not include an OpenMP runtime, so that torch's is used; without torch in the process, it is loaded from torch.
        if torch is not None and torch.origin is not None:
            runtime = Path(torch.origin).parent / "lib" / "libgomp.so.1"
            if runtime.exists():
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the native kernels cannot be loaded: {error}"
    library.halfplate_isa.restype = ctypes.c_char_p
    found: bytes = library.halfplate_isa()
    return _unknown_isa(library) or found.decode()


def library() -> ctypes.CDLL:
    """The loaded library; only call this if `available()`."""
    loaded = _open()[0]
    assert loaded is not None
    return loaded


def check(status: int, call: str) -> None:
    """Raise an error for the status of the native `call`: MemoryError, or HalfplateError for refused arguments."""
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for the intermediates of the native {call}")
    if status < 0:
        raise HalfplateError(f"the native {call} refused its arguments: {STATUS.get(status, f'status {status}')}")


def address(tensor: Tensor, dtype: torch.dtype, name: str) -> int:
    """The address of the data of `tensor`; raises HalfplateError unless it is contiguous, of `dtype` and on the CPU."""
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else ", not contiguous,"
        raise HalfplateError(
            f"{name} is {tensor.dtype}{layout} on {tensor.device}, expected {dtype}, contiguous, on cpu; the native kernels read no other"
        )
    return tensor.data_ptr()
