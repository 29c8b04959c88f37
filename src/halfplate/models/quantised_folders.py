"""Folders of models that other tools quantised (GPTQ, AWQ, compressed-tensors, FP8, MXFP4, MLX): their matrices are decoded when they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.models.configuration import MLX_ENTRY, QUANTISED_ENTRIES, QUANTISED_PARTS, quantisation_of
from halfplate.models.float_codes import MX_BLOCK, read_mxfp4, read_scaled
from halfplate.models.packed_words import AWQ_ORDER, WORD, read_awq, read_compressed_tensors, read_gptq, read_mlx
from halfplate.storage.tensor_file import CODES, KINDS, Encoded, StoredTensor, read_tensor

FP8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F16", "BF16", "F32")
WORDS = ("I32",)
VALUES = "F32"  # decoded values are not rounded further
CURE = "pass the fp32, bf16 or fp16 model it was made from"
# Scales of activations, which some tools round while a model runs. Weights do not need them.
OF_ACTIVATIONS = re.compile(r"\.(input_scale|input_zero_point|activation_scale|[kv]_scale)$")


@dataclass(frozen=True)
class QuantisedTensors:
    """The tensors of a quantised model by their names in a plain one.

    method: that config.json names.
    tensors: matrices of codes have `encoded`.
    matrices: their number; a tensor of all experts of a layer counts once.
    ignored: stored names of scales of activations.
    """

    method: str
    tensors: dict[str, StoredTensor]
    matrices: int
    ignored: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One sentence about how the model is read."""
        left = f"; scales of activations are left out ({self.ignored[0]}, ...)" if self.ignored else ""
        return f"its weights are codes of {self.method}: {self.matrices} matrices are decoded to floats when they are read, and what quantising lost stays lost{left}"


@dataclass
class _Folder:
    """The tensors of a model that are not yet explained, and the matrices found so far."""

    settings: dict[str, Any]
    left: dict[str, StoredTensor]
    found: dict[str, StoredTensor] = field(default_factory=dict)

    def take(self, *names: str) -> dict[str, StoredTensor]:
        """Those of `names` that exist, which are explained from now on."""
        return {name: self.left.pop(name) for name in names if name in self.left}

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, StoredTensor],
        decode: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        """The matrix `name` of these parts, by the names that `decode` knows."""
        encoded = Encoded(tuple(parts.items()), decode)
        first = encoded.parts[0][1]
        self.found[name] = StoredTensor(first.path, VALUES, shape, first.start, encoded.nbytes, encoded=encoded)


def decoded_tensors(
    name: str, entries: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> QuantisedTensors | None:
    """The tensors of a model in a plain form; None if config.json names no method that is read here, or if no tensor holds codes.

    name: of the model, as the user gave it. entries: content of its config.json. stored: the tensors of its files.
    Raises HalfplateError for variants of these formats that are not read.
    """
    method = quantisation_of(dict(entries))
    if method not in METHODS:
        return None
    keys = (MLX_ENTRY,) if method == "mlx" else QUANTISED_ENTRIES
    folder = _Folder(next(entries[key] for key in keys if entries.get(key)), dict(stored))
    holds_codes, read = METHODS[method]
    for full in stored:
        if full in folder.left and holds_codes(full, stored[full]):
            try:
                read(folder, full)
            except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
                raise HalfplateError(
                    f"model={name!r}: {full} cannot be read as {method} ({_reason(error)}); {CURE}"
                ) from None
    ignored = tuple(one for one in folder.left if OF_ACTIVATIONS.search(one)) if folder.found else ()
    folder.take(*ignored)
    for full, tensor in folder.left.items():
        if folder.found and (QUANTISED_PARTS.search(full) or tensor.kind in CODES or tensor.kind not in KINDS):
            raise HalfplateError(f"model={name!r}: {full} ({tensor.kind}) has no known meaning in {method}; {CURE}")
    if not folder.found:
        return None
    return QuantisedTensors(method, folder.left | folder.found, len(folder.found), ignored)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"it lacks {text}" if isinstance(error, KeyError) else text or type(error).__name__


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _check_kinds(parts: Mapping[str, StoredTensor], kinds: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError unless each part has one of its element types; parts that are not named hold floats."""
    for name, part in parts.items():
        expected = kinds.get(name, FLOATS)
        _need(part.kind in expected, f"{name} is {part.kind}, expected {' or '.join(expected)}")


def _gptq(folder: _Folder, full: str) -> None:
    version = folder.settings.get("checkpoint_format", "gptq")
    _need(version in ("gptq", "gptq_v2"), f"checkpoint_format is {version!r}, expected gptq or gptq_v2")
    module = full.removesuffix("qweight")
    parts = _below(folder, module, "qweight", "qzeros", "scales", "g_idx")
    _check_kinds(parts, {"qweight": WORDS, "qzeros": WORDS, "g_idx": ("I32", "I64")})
    words, rows = parts["qweight"].shape
    groups = parts["scales"].shape[0]
    # Modules may differ in bits; the order of the inputs has an entry for each of them.
    columns = parts["g_idx"].shape[0] if "g_idx" in parts else words * WORD // int(folder.settings["bits"])
    bits = words * WORD // columns
    _need(bits in (2, 3, 4, 8), f"{words} words for {columns} columns are {bits} bits, expected 2, 3, 4 or 8")
    _need(bits * columns == words * WORD and rows * bits % WORD == 0, f"{columns} × {rows} codes do not fill the words")
    _need(parts["scales"].shape == (groups, rows), f"scales have the shape {parts['scales'].shape}")
    _need(parts["qzeros"].shape == (groups, rows * bits // WORD), f"qzeros have the shape {parts['qzeros'].shape}")
    _check_groups(columns, groups, parts.get("g_idx"))
    decode = partial(read_gptq, bits=bits, zeros_less_one=version == "gptq")
    folder.add(f"{module}weight", (rows, columns), parts, decode)


def _awq(folder: _Folder, full: str) -> None:
    version, bits = str(folder.settings.get("version", "gemm")).lower(), folder.settings.get("bits", 4)
    _need(version == "gemm" and bits == 4, f"version is {version!r} of {bits} bits, expected gemm of 4")
    module = full.removesuffix("qweight")
    parts = _below(folder, module, "qweight", "qzeros", "scales")
    _check_kinds(parts, {"qweight": WORDS, "qzeros": WORDS})
    columns, words = parts["qweight"].shape
    groups, each = parts["scales"].shape[0], len(AWQ_ORDER)
    _need(parts["scales"].shape == (groups, words * each), f"scales have the shape {parts['scales'].shape}")
    _need(parts["qzeros"].shape == (groups, words), f"qzeros have the shape {parts['qzeros'].shape}")
    _check_groups(columns, groups)
    folder.add(f"{module}weight", (words * each, columns), parts, read_awq)


def _compressed_tensors(folder: _Folder, full: str) -> None:
    if not full.endswith(".weight_packed"):
        _scaled(folder, full)
        return
    module = full.removesuffix("weight_packed")
    beside = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    parts = _below(folder, module, "weight_packed", *beside)
    whole = ("I32", "I64")
    # Codes of FP4 are bytes.
    _check_kinds(
        parts, {"weight_packed": WORDS, "weight_zero_point": WORDS, "weight_shape": whole, "weight_g_idx": whole}
    )
    _need(prod(parts["weight_shape"].shape) == 2, "weight_shape does not hold two numbers")
    rows, columns = (int(side) for side in read_tensor(parts["weight_shape"]))
    height, words = parts["weight_packed"].shape
    bits = words * WORD // columns
    # Other numbers of bits cross words since compressed-tensors 0.20; before, they left some bits of each word unused.
    known = bits in (2, 4, 8) or (bits in (3, 5, 6, 7) and bits * columns == words * WORD)
    _need(height == rows and known, f"{words} words for {columns} columns are {bits} bits, expected 2 to 8")
    scales = parts["weight_scale"].shape
    groups = 1 if prod(scales) == 1 else scales[1]
    _need(prod(scales) == 1 or scales[0] == rows, f"weight_scale has the shape {scales}")
    zeros = parts.get("weight_zero_point")
    _need(zeros is None or zeros.shape == (-(-rows * bits // WORD), groups), "weight_zero_point has another shape")
    _check_groups(columns, groups, parts.get("weight_g_idx"))
    folder.add(f"{module}weight", (rows, columns), parts, partial(read_compressed_tensors, bits=bits))


def _scaled(folder: _Folder, full: str) -> None:
    """Numbers with the scales of blocks, rows or the whole matrix: FP8, and int8 of compressed-tensors."""
    scale = next((one for end in ("_scale_inv", "_scale") if (one := f"{full}{end}") in folder.left), None)
    _need(scale is not None, f"there is no {full}_scale_inv and no {full}_scale")
    assert scale is not None
    parts = {"codes": folder.left.pop(full), "scales": folder.left.pop(scale)}
    _check_kinds(parts, {"codes": (*FP8, "I8"), "scales": (*FLOATS, "F8_E8M0")})
    if zeros := folder.take(f"{full}_zero_point"):
        (parts["zeros"],) = zeros.values()
        _need(
            parts["codes"].kind == "I8" and parts["zeros"].shape == parts["scales"].shape,
            "its zeros have another shape",
        )
    shape, own = parts["codes"].shape, parts["scales"].shape
    _need(len(shape) in (2, 3), f"codes have the shape {shape}")
    sides = _block_sides(folder.settings, shape, own)
    if sides is None:
        raise ValueError(f"scales have the shape {own}, and config.json names no blocks (weight_block_size)")
    (rows, columns), (height, width) = shape[-2:], sides
    scales = (*shape[:-2], -(-rows // height), -(-columns // width))
    _need(
        prod(own) == prod(scales) and (len(own) < 2 or own[0] == scales[0]),
        f"scales have the shape {own}, expected {scales} for blocks of {height} × {width}",
    )
    folder.add(full, shape, parts, partial(_read_scaled, shape=scales, height=height, width=width))


def _block_sides(
    settings: Mapping[str, Any], shape: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by the shape of the scales or else by the configuration; None if neither tells."""
    rows, columns = shape[-2:]
    own = scales[1:] if len(shape) == 3 else scales
    if prod(own) == 1:
        return rows, columns
    if own in ((rows,), (rows, 1)):
        return 1, columns
    stated = settings.get("weight_block_size")
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        width = weights.get("group_size")
        stated = stated or weights.get("block_structure") or (width and [1, width])
    if not stated:
        return None
    height, width = (int(side) for side in stated)
    return height, width


def _read_scaled(tensors: Mapping[str, Tensor], shape: tuple[int, ...], height: int, width: int) -> Tensor:
    """`read_scaled` of scales that are stored in another shape. shape: theirs, of all matrices."""
    own = shape[1:] if tensors["codes"].ndim < len(shape) else shape
    return read_scaled(
        {name: tensor if name == "codes" else tensor.reshape(own) for name, tensor in tensors.items()}, height, width
    )


def _mxfp4(folder: _Folder, full: str) -> None:
    name = full.removesuffix("_blocks")
    parts = {"blocks": folder.left.pop(full), "scales": folder.left.pop(f"{name}_scales")}
    experts, rows, groups, pairs = parts["blocks"].shape
    _need(2 * pairs == MX_BLOCK and parts["blocks"].kind == "U8", f"blocks have the shape {parts['blocks'].shape}")
    _need(
        parts["scales"].shape == (experts, rows, groups) and parts["scales"].kind == "U8",
        f"scales have the shape {parts['scales'].shape}",
    )
    # As the model names them, the matrices of gpt-oss are (inputs, outputs).
    folder.add(name, (experts, groups * MX_BLOCK, rows), parts, partial(read_mxfp4, transposed=True))


def _mlx(folder: _Folder, full: str) -> None:
    module = full.removesuffix("weight")
    entry = folder.settings.get(module[:-1], folder.settings)
    mode = entry.get("mode", folder.settings.get("mode", "affine"))
    _need(mode == "affine", f"its mode is {mode!r}, expected affine")
    parts = _below(folder, module, "weight", "scales", "biases")
    _check_kinds(parts, {"weight": ("U32",)})
    rows, words = parts["weight"].shape
    columns = parts["scales"].shape[1] * int(entry["group_size"])
    bits = words * WORD // columns
    _need(bits in (2, 3, 4, 5, 6, 8) and bits * columns == words * WORD, f"{words} words do not hold {columns} columns")
    _need(
        parts["scales"].shape[0] == rows and parts["biases"].shape == parts["scales"].shape,
        f"scales have the shape {parts['scales'].shape}, biases {parts['biases'].shape}",
    )
    folder.add(full, (rows, columns), parts, partial(read_mlx, bits=bits))


def _below(folder: _Folder, module: str, *leaves: str) -> dict[str, StoredTensor]:
    """The tensors of a module by their last names."""
    return {name.removeprefix(module): one for name, one in folder.take(*(module + leaf for leaf in leaves)).items()}


def _check_groups(columns: int, groups: int, order: StoredTensor | None = None) -> None:
    """Raise ValueError unless the groups of a row cover its columns."""
    if order is None:
        _need(groups > 0 and columns % groups == 0, f"{groups} groups do not divide {columns} columns")
        return
    _need(
        order.shape == (columns,) and order.kind in ("I32", "I64"),
        f"the group of each column has the shape {order.shape}",
    )
    found = read_tensor(order)
    _need(int(found.min()) >= 0 and int(found.max()) < groups, f"a column is in a group beyond {groups}")


def _packs(name: str, stored: StoredTensor) -> bool:
    return name.endswith(".weight_packed") or stored.kind in FP8 or (stored.kind == "I8" and name.endswith(".weight"))


# For each method, whether a stored tensor holds codes of a matrix, and what reads the matrix.
METHODS: dict[str, tuple[Callable[[str, StoredTensor], bool], Callable[[_Folder, str], None]]] = {
    "gptq": (lambda name, _: name.endswith(".qweight"), _gptq),
    "awq": (lambda name, _: name.endswith(".qweight"), _awq),
    "compressed-tensors": (_packs, _compressed_tensors),
    "fp8": (lambda _, stored: stored.kind in FP8, _scaled),
    "fbgemm_fp8": (lambda _, stored: stored.kind in FP8, _scaled),
    "mxfp4": (lambda name, _: name.endswith("_blocks"), _mxfp4),
    "mlx": (lambda name, stored: name.endswith(".weight") and stored.kind == "U32", _mlx),
}
