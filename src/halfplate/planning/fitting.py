"""The bytes within which a budget chooses the formats of all matrices: a share of the original, a size of the file, or a size in memory."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.allocation import TARGETS, Target, candidates
from halfplate.calibration.self_text import token_nbytes
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.formats.spec import WeightSpec
from halfplate.headroom import spoken
from halfplate.kernels.linear import NATIVE, header_of
from halfplate.kernels.native import available
from halfplate.models.gguf_families.table import family_of_model
from halfplate.models.gguf_tokenizer_writer import add_tokenizer
from halfplate.models.sources import Source, load_tokenizer
from halfplate.planning.sizes import ModelSizes
from halfplate.recipe import Recipe
from halfplate.runtime.cache import ROOM

# Allowances for what describes a tensor: its entry in a header with padding, the entry of a matrix in config.json, and the rest.
HEADER_ENTRY, CONFIG_ENTRY, REST = 120, 350, 20_000
LLAMA_BATCH = 512  # tokens that llama.cpp computes at once
PROCESS = 600_000_000  # Python with torch and transformers, while a model runs; measured 555 MB
FP32, FP16 = 4, 2
KEEP_FP32 = {
    "vllm": 1,
    "mlx": 2,
}  # targets that write a model in fp32 as it is, and the fp16 numbers of a group that become fp32


@dataclass(frozen=True)
class Limit:
    """Bytes for everything, and what is taken from them before the matrices, the embedding and the output layer.

    asked: the argument and its value, for messages.
    total: bytes for everything.
    parts: bytes of everything else, in words.
    target: what the bytes of a matrix are counted for; in_memory: loaded by it, and not in its file.
    """

    asked: str
    total: int
    target: Target
    parts: Mapping[str, int] = field(default_factory=dict)
    in_memory: bool = False

    @property
    def outside(self) -> int:
        """Bytes of everything else."""
        return sum(self.parts.values())

    @property
    def matrices(self) -> int:
        """Bytes that are left for the matrices, the embedding and the output layer."""
        return self.total - self.outside

    def cost(self, spec: WeightSpec) -> int:
        """Bytes of one matrix."""
        return _loaded(spec) if self.in_memory and self.target.sparse else self.target.nbytes(spec)

    @property
    def spoken(self) -> str:
        """What is counted, in words."""
        return f"in the memory of {MEMORY_OF[self.target.name]}" if self.in_memory else f"as a {self.target.spoken}"

    def to_json(self) -> dict[str, Any]:
        """The entry in `plan --json`."""
        counted = "memory" if self.in_memory else "file"
        return {"target": self.target.name, "of": counted, "nbytes": self.total, "outside": dict(self.parts)}

    def spent(self, specs: Iterable[WeightSpec]) -> int:
        """Bytes of everything with matrices of `specs`."""
        return self.outside + sum(map(self.cost, specs))


@dataclass(frozen=True)
class Outside:
    """What a limit needs to know of a model beside its matrices.

    tensors: those that are not compressed, tied ones once. specs: of the matrices, the embedding and the output layer.
    """

    source: Source
    sizes: ModelSizes
    tensors: Mapping[str, Tensor]
    specs: Mapping[str, WeightSpec]
    other_nbytes: int
    tied: bool


def limit_of(recipe: Recipe, outside: Outside) -> Limit | None:
    """The limit that a recipe sets in bytes; None if it sets none.

    Raises HalfplateError if its target does not know the model, or is not counted in memory.
    """
    target = TARGETS[recipe.target]
    target.check_model(outside.source.config.model_type, outside.specs)
    if recipe.budget is not None:
        whole = sum(spec.dense_nbytes for spec in outside.specs.values())
        return Limit(f"budget={recipe.budget:g}", int(recipe.budget * whole), target)
    if recipe.fit is not None:
        return Limit(f"fit={spoken(recipe.fit)}", recipe.fit, target, _in_file(target, outside))
    if recipe.fit_ram is not None:
        if target.name not in MEMORY:
            raise HalfplateError(
                f"fit_ram={spoken(recipe.fit_ram)} is for the targets {' and '.join(MEMORY)}, received target={target.name!r}, which reserves "
                "its memory itself; use fit"
            )
        parts = MEMORY[target.name](outside, recipe.context)
        return Limit(f"fit_ram={spoken(recipe.fit_ram)}", recipe.fit_ram, target, parts, in_memory=True)
    return None


def _in_file(target: Target, outside: Outside) -> dict[str, int]:
    """Everything in the files of the result beside the matrices."""
    stored = len(outside.tensors) + sum(len(spec.layout()) for spec in outside.specs.values())
    described = REST + HEADER_ENTRY * stored + sum(map(len, [*outside.tensors, *outside.specs]))
    described += 0 if target.name == "gguf" else CONFIG_ENTRY * len(outside.specs)
    parts = {"other tensors": _other_nbytes(target, outside)}
    if target.name in KEEP_FP32 and outside.source.other_dtype == torch.float32:
        of_groups = KEEP_FP32[target.name] * FP16
        parts["scales in fp32"] = sum(spec.d_out * spec.d_in // 32 * of_groups for spec in outside.specs.values())
    return parts | {"headers and configuration": described, "tokenizer": _tokenizer_nbytes(target, outside)}


def _other_nbytes(target: Target, outside: Outside) -> int:
    if target.sparse:
        return outside.other_nbytes
    if target.name != "gguf":
        size = FP32 if target.name in KEEP_FP32 and outside.source.other_dtype == torch.float32 else FP16
        return size * sum(tensor.numel() for tensor in outside.tensors.values())
    found = sum(tensor.numel() * (FP32 if tensor.ndim < 2 else FP16) for tensor in outside.tensors.values())
    if outside.tied and family_of_model(outside.source.config.model_type).head == "own":
        # llama.cpp wants the output layer once more.
        table = outside.sizes.hidden * outside.sizes.vocabulary
        compressed = any(spec.same_as is not None for spec in outside.specs.values())
        found += table * 17 // 16 if compressed else FP16 * table
    return found


def _tokenizer_nbytes(target: Target, outside: Outside) -> int:
    """Bytes of the tokenizer in the result, written once to find them out: its size in the source may be twice or half as large."""
    tokenizer = load_tokenizer(outside.source)
    with TemporaryDirectory(prefix="halfplate-") as folder:
        if target.name == "gguf":
            from gguf import GGUFWriter

            path = Path(folder) / "tokenizer.gguf"
            writer = GGUFWriter(str(path), "llama")
            with warnings.catch_warnings():  # the export gives them
                warnings.simplefilter("ignore", HalfplateWarning)
                add_tokenizer(writer, tokenizer, outside.sizes.vocabulary)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
        else:
            tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _in_halfplate(outside: Outside, context: int) -> dict[str, int]:
    """As Halfplate loads it: matrices in the layout of the kernels, floats that bf16 holds in bf16, a cache in fp32 that grows by doubling."""
    size = FP16 if outside.source.other_dtype == torch.bfloat16 else FP32
    tensors = sum(tensor.numel() * (FP32 if tensor.ndim < 2 else size) for tensor in outside.tensors.values())
    if outside.tied and not any(spec.same_as is not None for spec in outside.specs.values()):
        tensors += size * outside.sizes.hidden * outside.sizes.vocabulary
    positions = ROOM
    while positions < context:
        positions *= 2
    each, sizes = token_nbytes(outside.source.config, context), outside.sizes
    scratch = FP32 * (context * (4 * sizes.hidden + 3 * sizes.ffn) + sizes.vocabulary)
    return {
        "Python with torch and transformers": PROCESS,
        "other tensors": tensors,
        f"cache: room for {positions} tokens × {each} bytes": positions * each,
        f"scratch: 4 × ({context} tokens × (4 × {sizes.hidden} + 3 × {sizes.ffn}) + {sizes.vocabulary})": scratch,
    }


def _in_llama_cpp(outside: Outside, context: int) -> dict[str, int]:
    """As llama.cpp loads it with its defaults: the file, a cache in F16, and buffers for batches of 512 tokens."""
    each, sizes, batch = token_nbytes(outside.source.config, context) // 2, outside.sizes, min(context, LLAMA_BATCH)
    scratch = FP32 * batch * (4 * sizes.hidden + 3 * sizes.ffn + sizes.vocabulary)
    return _in_file(TARGETS["gguf"], outside) | {
        f"cache: {context} tokens × {each} bytes": context * each,
        f"scratch: 4 × {batch} tokens × (4 × {sizes.hidden} + 3 × {sizes.ffn} + {sizes.vocabulary})": scratch,
    }


MEMORY = {"halfplate": _in_halfplate, "gguf": _in_llama_cpp}
MEMORY_OF = {"halfplate": "Halfplate", "gguf": "llama.cpp"}


def in_one_format(
    limit: Limit, recipe: Recipe, layers: Iterable[WeightSpec], tables: Iterable[WeightSpec]
) -> dict[str, int]:
    """The bytes of everything if every matrix of the layers had the same type of core, where it can have it, by types with their groups.

    tables: of the embedding and the output layer, which keep their types.
    """
    counts, method = Counter(layers), recipe.create_method()
    offered = {spec: candidates(spec, method, recipe.choose, limit.target) for spec in counts}
    names = {(level.core_dtype, level.group) for levels in offered.values() for level in levels}
    start, found = limit.spent(tables), {}
    for core, group in names:
        each = {
            spec: next((one for one in levels if (one.core_dtype, one.group) == (core, group)), levels[0])
            for spec, levels in offered.items()
        }
        found[f"{core} ({group})"] = start + sum(counts[spec] * limit.cost(level) for spec, level in each.items())
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def _loaded(spec: WeightSpec) -> int:
    """Bytes of a matrix in the memory of Halfplate, where codes have four, five or eight bits. A head has its own copy of a tied table."""
    own = spec.alone
    if not available() or NATIVE.refusal(own) is not None:
        return own.nbytes
    return int(header_of(own, "float", False).nbytes)


def uncompressed(model: nn.Module, compressed: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a model that are not weights of `compressed`, tied ones once, by name."""
    state = model.state_dict(keep_vars=True)
    replaced = {id(state[f"{name}.weight"]) for name in compressed}
    met: dict[int, str] = {}
    for name, tensor in state.items():
        if id(tensor) not in replaced:
            met.setdefault(id(tensor), name)
    return {name: state[name] for name in met.values()}
