"""Writing a checkpoint as a Hugging Face folder whose linears hold codes in another tool's layout, for the exports that do so."""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.checkpoint.config import CONFIG_FILE, RECORD_FILE, other_dtype, read_record
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.output import check_result_folder
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.checkpoint.weights import read_headers
from halfplate.checkpoint.write import write_model, write_record
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.formats import CompressedMatrix, NMSparse, WeightSpec
from halfplate.formats.embedding import CompressedEmbedding
from halfplate.formats.quantizers import Quantizer, quantizer_of, whole_numbers
from halfplate.formats.quantizers.affine import Affine
from halfplate.models.experts import experts_of
from halfplate.models.sources import is_compressed
from halfplate.storage.tensor_file import read_tensors

GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Scheme:
    """How a matrix is held: bits of a code, and columns that share a scale. core_dtype: of the checkpoint, which does not matter to readers."""

    bits: int
    group: int
    core_dtype: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.core_dtype} in {self.bits} bits and groups of {self.group}"


@dataclass(frozen=True)
class Codes:
    """A matrix of codes c and its value c · scale + minimum.

    codes: uint8 (d_out, d_in), below 2^bits.
    scales: fp16 (d_out, groups), and minima in the same shape; if there are none, c − 2^(bits − 1) stands in the place of c.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None


@dataclass(frozen=True)
class PackedFormat:
    """A layout of codes.

    name: of the format, and its `quant_method`.
    recipe: makes checkpoints that it holds exactly.
    bits: the sizes of codes, smallest first.
    keeps_fp32: write fp32 models in fp32; all others become fp16, because bf16 does not hold fp16 scales.
    pack: the tensors of a module, from its codes and the scheme.
    read: the values that such tensors hold, fp32 (d_out, d_in).
    configuration: the `quantization_config` of a model, from the scheme of each packed linear and the names of the other ones.
    rows: number that must divide d_out.
    minima: whether groups may have a minimum.
    tables: whether embeddings and output layers may be codes.
    entry: of config.json that holds the configuration.
    further: other entries that the reader wants, made of the content of config.json.
    """

    name: str
    recipe: str
    bits: tuple[int, ...]
    keeps_fp32: bool
    pack: Callable[[Codes, Scheme], dict[str, Tensor]]
    read: Callable[[Mapping[str, Tensor], Scheme], Tensor]
    configuration: Callable[[Mapping[str, Scheme], list[str]], dict[str, Any]]
    rows: int = 1
    minima: bool = False
    tables: bool = False
    entry: str = "quantization_config"
    further: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}


class _Holder(nn.Module):
    """The tensors of a packed linear under their names in the file."""

    def __init__(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if bias is not None:
            self.register_parameter("bias", nn.Parameter(bias.detach(), requires_grad=False))


@torch.no_grad()
def export_packed(format: PackedFormat, source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint in `format`, read it back, and return a sentence that describes it (see `halfplate.exports.Exporter`)."""
    check_result_folder(out, overwrite, Path(source))
    if not is_compressed(source):
        raise HalfplateError(
            f"path={source!r} is not a Halfplate checkpoint, and format={format.name!r} holds only codes; run "
            f"`halfplate compress {source} -o OUT --recipe {format.recipe}` and export OUT"
        )
    folder = Path(source)
    recorded = (folder / RECORD_FILE).is_file()
    inspect_checkpoint(folder, verify=recorded)
    model, dtype = load(folder, kernels=False), other_dtype(folder)
    if experts_of(model):
        raise HalfplateError(
            f"path={source!r} has experts, which format={format.name!r} of Halfplate does not write; use --format gguf or dense"
        )
    quantizer: Any = model.hf_quantizer
    if quantizer.conv1d:
        raise HalfplateError(
            f"path={source!r} is a {model.config.model_type} model, whose weights are transposed in files of this family, which format={format.name!r} of Halfplate "
            "does not write; use --format dense"
        )
    if dtype != torch.float32 or not format.keeps_fp32:
        dtype = torch.float16
    schemes, values, obstacles = _pack(format, model)
    if not schemes:
        found = ", ".join(obstacles) or "it has no matrices"
        raise HalfplateError(
            f"path={source!r} has no matrix that format={format.name!r} holds: they {found}; compress the model with --recipe {format.recipe}"
        )
    model = model.dequantize()
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    known = {key: read_record(folder).get(key) for key in ("model", "base_model", "license")} if recorded else {}
    with new_folder(out, overwrite) as target:
        write_model(model, load_tokenizer(folder), target, dtype, quantization=None)
        _add_configuration(target, format, format.configuration(schemes, names))
        write_record(target, known | {"exported": format.name})
        rounded = _read_back(format, target, schemes, values, model, dtype)
    _warn(format, obstacles)
    held = Counter(map(str, schemes.values()))
    kinds = ", ".join(f"{count} linears of {kind}" for kind, count in held.items())
    others = f"; {rounded} other tensors are rounded to {str(dtype).removeprefix('torch.')}" if rounded else ""
    return f"{out}: {source} as {format.name}, {kinds}; read back, {len(schemes)} of {len(schemes)} equal the checkpoint value for value{others}"


def scheme_of(format: PackedFormat, spec: WeightSpec) -> Scheme | str:
    """How `format` holds a matrix exactly, or why it cannot, as the end of a sentence about matrices."""
    quantizer = quantizer_of(spec.core_dtype)
    if len(spec.classes) > 1:
        return "have wrappers or other parts beside the core"
    if not spec.pattern.is_dense:
        return f"are {spec.pattern} sparse"
    numbers = None if quantizer is None else _numbers(format, quantizer)
    bits = [b for b in format.bits if numbers and max(numbers) - min(numbers) < 1 << b and _fits(numbers, b)]
    if not bits:
        return f"have core_dtype={spec.core_dtype!r}"
    groups = [group for group in GROUPS if spec.group % group == 0 and spec.d_in % group == 0]
    if spec.group % GROUPS[-1]:
        return f"have groups of {spec.group} columns"
    if not groups or spec.d_out % format.rows:
        side, number = ("columns", spec.d_in) if not groups else ("rows", spec.d_out)
        return f"have {number} {side}, which is not a multiple of {GROUPS[-1]}"
    return Scheme(bits[0], groups[0], spec.core_dtype)


def _numbers(format: PackedFormat, quantizer: Quantizer) -> tuple[int, ...] | None:
    """The number that each code multiplies its scale by, smallest code first; None if the format does not hold such a quantizer."""
    if not isinstance(quantizer, Affine):
        return whole_numbers(quantizer)
    return tuple(range(1 << quantizer.bits)) if format.minima else None


def _fits(numbers: tuple[int, ...], bits: int) -> bool:
    """Whether codes of so many bits count all `numbers`, from 0 on or around 0."""
    half = 1 << bits - 1
    return min(numbers) == 0 or (-half <= min(numbers) and max(numbers) < half)


def _pack(
    format: PackedFormat, model: nn.Module
) -> tuple[dict[str, Scheme], dict[str, Callable[[], Tensor]], dict[str, list[str]]]:
    """Replace the matrices that `format` holds, in place. Returns their schemes and values, and the names of the others by obstacle."""
    schemes: dict[str, Scheme] = {}
    values: dict[str, Callable[[], Tensor]] = {}
    obstacles: dict[str, list[str]] = defaultdict(list)
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        table = isinstance(module, CompressedEmbedding) or module is output
        if not isinstance(module, CompressedMatrix) or (table and not format.tables):
            continue
        lender = module.spec.same_as
        if lender in schemes:
            # The reader ties the output layer to the embedding.
            model.set_submodule(name, nn.Module())
            model.config.tie_word_embeddings = True  # type: ignore[union-attr]
            continue
        if lender is not None:
            continue
        scheme = scheme_of(format, module.spec)
        if isinstance(scheme, str):
            obstacles[scheme].append(name)
            continue
        schemes[name], core = scheme, module.matrix.core
        values[name] = core.dense
        bias = getattr(module, "bias", None)
        model.set_submodule(name, _Holder(format.pack(_codes(core, scheme), scheme), bias))
    return schemes, values, dict(obstacles)


def _codes(core: NMSparse, scheme: Scheme) -> Codes:
    """The codes of a matrix in groups of the scheme."""
    grid = core.grid
    assert grid is not None, "floats have no scheme"
    groups = torch.arange(core.shape[1] // scheme.group, dtype=torch.int64, device="cpu") * scheme.group // grid.group
    scales, *minima = (part.detach()[:, groups].contiguous() for part in grid.parameters)
    counted = core.integers() - grid.quantizer.range[0]
    if minima:
        return Codes(counted.to(torch.uint8), scales, minima[0])
    numbers = whole_numbers(grid.quantizer)
    assert numbers is not None, "others have no scheme"
    table = torch.tensor(numbers, dtype=torch.int16, device="cpu") + (1 << scheme.bits - 1)
    return Codes(table[counted.long()].to(torch.uint8), scales)


def _add_configuration(target: Path, format: PackedFormat, quantization: dict[str, Any]) -> None:
    path = target / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= format.further(content) | {format.entry: quantization}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_back(
    format: PackedFormat,
    target: Path,
    schemes: Mapping[str, Scheme],
    values: Mapping[str, Callable[[], Tensor]],
    model: nn.Module,
    dtype: torch.dtype,
) -> int:
    """Compare every tensor of the folder with what it was made of; returns the number of tensors that `dtype` rounds."""
    packed: dict[str, dict[str, Tensor]] = defaultdict(dict)
    state, rounded = model.state_dict(), 0
    for name, tensor in read_tensors(read_headers(target)):
        owner, _, leaf = name.rpartition(".")
        if owner in schemes and leaf != "bias":
            packed[owner][leaf] = tensor
            continue
        wanted = state[name]
        if not torch.equal(tensor, wanted.to(tensor.dtype)):
            raise _differs(target, name)
        rounded += not torch.equal(tensor.to(wanted.dtype), wanted)
    for name, scheme in schemes.items():
        if name not in packed or not torch.equal(format.read(packed[name], scheme), values[name]()):
            raise _differs(target, name)
    return rounded


def _differs(target: Path, name: str) -> HalfplateError:
    return HalfplateError(
        f"out={str(target)!r}: read back, {name} differs from the checkpoint; the disk or memory may be faulty, write it again or report this"
    )


def _warn(format: PackedFormat, obstacles: Mapping[str, list[str]]) -> None:
    for obstacle, names in obstacles.items():
        sized = obstacle.endswith(f"multiple of {GROUPS[-1]}")
        cure = (
            "" if sized else f"; `halfplate compress MODEL -o OUT --recipe {format.recipe}` makes what it holds exactly"
        )
        warnings.warn(
            f"format={format.name!r}: {len(names)} matrices ({names[0]}{', ...' if names[1:] else ''}) {obstacle}, which the format cannot hold: they are "
            f"multiplied out, at full size{cure}",
            HalfplateWarning,
            stacklevel=5,
        )
