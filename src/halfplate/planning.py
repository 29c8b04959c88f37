"""What a compression will do to every matrix of a model, known before anything is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from halfplate import plugins
from halfplate.allocation.candidates import CHOICES, candidates
from halfplate.calibration.collect import BATCH, input_stages
from halfplate.calibration.documents import check_source
from halfplate.calibration.self_text import CACHE_BYTES
from halfplate.calibration.text import check_seq_len
from halfplate.errors import HalfplateError
from halfplate.formats.sharing import share
from halfplate.formats.spec import WeightSpec
from halfplate.methods.base import Method
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.linears import FoundLinear, find_linears
from halfplate.models.sources import Source, open_source, skeleton
from halfplate.pattern import Pattern
from halfplate.recipe import Recipe
from halfplate.statistics import Statistic
from halfplate.version import package_version

AUTO_BLOCKS = (128, 64, 32, 16, 8)
AUTO_SHARE = 0.05  # of the dense parameters of the whole plan

# Rough figures for 2 quiet cores; they serve the estimate alone.
SECONDS_PER_MILLION_WEIGHTS = {"armor": 1.5, "sparsegpt": 0.12, "denoiserotator": 1.5}
OTHER_SECONDS_PER_MILLION_WEIGHTS = 0.02
FLOPS_PER_SECOND = 1e11
PASSES = {"dense": 1.5, "compressed": 4.0}  # over the calibration text, products for the statistics among them
SAMPLING_SLOWDOWN = 1.2  # a sampled token costs so many times one that is read


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix of the model: how it will be stored, or why it stays dense.

    shape: (d_out, d_in), or None where a skipped module is no single matrix. spec: None where it is skipped.
    """

    name: str
    shape: tuple[int, ...] | None
    block: int | None
    method: str
    spec: WeightSpec | None
    reason: str | None = None

    @property
    def skipped(self) -> bool:
        return self.spec is None

    def to_json(self) -> dict[str, Any]:
        """The entry of this matrix in `plan --json`."""
        spec = self.spec
        return {
            "name": self.name,
            "format": spec.format if spec else "dense",
            "pattern": str(spec.pattern) if spec else None,
            "core_dtype": spec.core_dtype if spec else None,
            "shape": list(self.shape) if self.shape else None,
            "nbytes": spec.nbytes if spec else None,
            "dense_nbytes": spec.dense_nbytes if spec else None,
            "method": None if self.skipped else self.method,
            "skipped": self.skipped,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Plan:
    """Every matrix, the bytes before and after, and a fingerprint of all that decides the result.

    other_nbytes: bytes of all that stays dense (embeddings, norms, biases, lm_head, skipped matrices), as it will be
    stored. source_nbytes: bytes of the weight files read. wrapper_share: wrapper parameters over dense parameters.
    """

    model: str
    recipe: Recipe
    matrices: tuple[MatrixPlan, ...]
    block_size: int
    parameters: int
    other_nbytes: int
    source_nbytes: int
    fingerprint: str
    seconds_estimate: float
    peak_memory_estimate: int

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """The matrices that will be compressed, by name."""
        return {matrix.name: matrix.spec for matrix in self.matrices if matrix.spec is not None}

    def with_specs(self, specs: Mapping[str, WeightSpec]) -> Plan:
        """The plan with the matrices in `specs` stored as it says."""
        return replace(self, matrices=tuple(replace(m, spec=specs.get(m.name, m.spec)) for m in self.matrices))

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def dense_nbytes(self) -> int:
        return sum(spec.dense_nbytes for spec in self.specs.values())

    @property
    def wrapper_share(self) -> float:
        return _wrapper_share(list(self.specs.values()))

    def to_json(self) -> dict[str, Any]:
        """The keys of `plan --json`."""
        return {
            "model": self.model,
            "recipe": self.recipe.to_json(),
            "fingerprint": self.fingerprint,
            "matrices": [matrix.to_json() for matrix in self.matrices],
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "other_nbytes": self.other_nbytes,
            "source_nbytes": self.source_nbytes,
            "parameters": self.parameters,
            "block_size": self.block_size,
            "wrapper_share": self.wrapper_share,
            "seconds_estimate": round(self.seconds_estimate, 1),
            "peak_memory_bytes_estimate": self.peak_memory_estimate,
        }


def make_plan(model: str, recipe: Recipe) -> Plan:
    """Plan the compression of `model`, reading its configuration and no weight; raises HalfplateError on bad input."""
    return plan_source(open_source(model), recipe)


def plan_source(source: Source, recipe: Recipe) -> Plan:
    """`make_plan` of a source that is already open."""
    dense, method = skeleton(source), recipe.create_method()
    if recipe.runs_text(method.requires):
        check_source(recipe.calibration)
        check_seq_len(dense, recipe.seq_len, least=2)
    found, passed_over = find_linears(dense, include=recipe.include, exclude=recipe.exclude)
    pattern = recipe.parsed_pattern
    fitting = [linear for linear in found if linear.d_in % pattern.m == 0]
    if not fitting:
        raise HalfplateError(_nothing_fits(source.name, found, pattern))
    block = _block_size(recipe, fitting) if method.wrapped or method.low_rank else 0

    matrices = []
    for linear in found:
        spec, reason = None, None
        if linear.d_in % pattern.m:
            reason = f"d_in={linear.d_in} is not a multiple of M={pattern.m} (pattern {pattern})"
        else:
            spec = recipe.spec(linear.d_out, linear.d_in, block)
            method.check_spec(spec)
        matrices.append(MatrixPlan(linear.name, (linear.d_out, linear.d_in), linear.block, recipe.method, spec, reason))
    matrices += [
        MatrixPlan(skip.name, _shape(dense, skip.name), None, recipe.method, None, skip.reason) for skip in passed_over
    ]

    if recipe.share_wrappers:
        matrices = _sharing(dense, matrices)
    if recipe.budget is not None:
        _check_budget(recipe.budget, [m.spec for m in matrices if m.spec is not None], recipe, method)

    parameters = sum(parameter.numel() for parameter in dense.parameters())
    compressed = {matrix.name for matrix in matrices if not matrix.skipped}
    weights = sum(linear.d_out * linear.d_in for linear in found if linear.name in compressed)
    hidden_size = dense.config.get_text_config().hidden_size
    return Plan(
        model=source.name,
        recipe=recipe,
        matrices=tuple(matrices),
        block_size=block,
        parameters=parameters,
        other_nbytes=_other_nbytes(dense, compressed, source.other_dtype),
        source_nbytes=source.nbytes,
        fingerprint=_fingerprint(source, recipe),
        seconds_estimate=_seconds(recipe, method.requires, weights, parameters),
        peak_memory_estimate=_peak_memory(
            recipe, method.requires, parameters, hidden_size, max(linear.d_in for linear in fitting)
        ),
    )


def _sharing(dense: PreTrainedModel, matrices: list[MatrixPlan]) -> list[MatrixPlan]:
    """`matrices` with one input wrapper for all that the model gives one input."""
    names: dict[int, list[str]] = {}
    for matrix in matrices:
        if matrix.spec is not None and matrix.block is not None:
            names.setdefault(matrix.block, []).append(matrix.name)
    specs = share({matrix.name: matrix.spec for matrix in matrices if matrix.spec is not None}, _groups(dense, names))
    return [replace(matrix, spec=specs.get(matrix.name)) for matrix in matrices]


def _groups(dense: PreTrainedModel, names: dict[int, list[str]]) -> list[list[str]]:
    """The linears `names` of each block by the input that they share, found by a run without any numbers."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            blockwise = BlockwiseModel(dense)
            batch = blockwise.embed(torch.zeros(1, 2, dtype=torch.int64, device="meta"))
            stages = {block: input_stages(blockwise, block, batch, inside) for block, inside in names.items()}
    # Each model class fails with errors of its own where it asks for values that are not there.
    except Exception as error:
        raise HalfplateError(
            f"share_wrappers=True: which linears of {type(dense).__name__} share an input cannot be found without running it "
            f"({type(error).__name__}: {' '.join(str(error).split())}); leave it out"
        ) from error
    # The plan's order decides which of them stores the wrapper.
    return [sorted(stage, key=names[block].index) for block in stages for stage in stages[block]]


def _check_budget(budget: float, specs: list[WeightSpec], recipe: Recipe, method: Method) -> None:
    least = sum(candidates(spec, method, recipe.choose)[0].nbytes for spec in specs)
    share = least / sum(spec.dense_nbytes for spec in specs)
    if share > budget:
        raise HalfplateError(
            f"budget={budget:g} cannot be met: the least is {share:.4f} of the dense bytes with choose={', '.join(recipe.choose) or 'nothing'}; "
            f"raise it, or add to --choose ({', '.join(CHOICES)})"
        )


def _nothing_fits(name: str, found: list[FoundLinear], pattern: Pattern) -> str:
    if not found:
        return f"model={name!r} has no linear left to compress; loosen --include and --exclude"
    sizes = ", ".join(str(size) for size in sorted({linear.d_in for linear in found}))
    return f"pattern={pattern}: M={pattern.m} divides no d_in of {name!r} ({sizes}); choose an M that divides one"


def _block_size(recipe: Recipe, linears: list[FoundLinear]) -> int:
    """The block size asked for; for `auto` the largest whose wrappers stay within AUTO_SHARE, else the smallest."""
    if recipe.block_size != "auto":
        return recipe.block_size
    m = recipe.parsed_pattern.m
    blocks = [max(size // m, 1) * m for size in AUTO_BLOCKS]
    for block in blocks:
        if _wrapper_share([recipe.spec(linear.d_out, linear.d_in, block) for linear in linears]) <= AUTO_SHARE:
            return block
    # A model so small that no block is cheap gains more from wrappers than it pays.
    return blocks[-1]


def _wrapper_share(specs: list[WeightSpec]) -> float:
    """Parameters of wrappers and low-rank parts over dense parameters."""
    wrappers = 0
    for spec in specs:
        wrappers += spec.rank * (spec.d_out + spec.d_in)
        in_block = 0 if spec.in_shared else spec.in_block
        for size, block in ((spec.d_out, spec.out_block), (spec.d_in, in_block)):
            if block:
                wrappers += size // block * block**2 + (size % block) ** 2
    return wrappers / sum(spec.d_out * spec.d_in for spec in specs)


def _shape(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    weight = getattr(model.get_submodule(name), "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None


def _other_nbytes(model: nn.Module, compressed: set[str], dtype: torch.dtype) -> int:
    """Bytes of everything but the compressed weights, tied tensors once, as it will be stored."""
    replaced = {f"{name}.weight" for name in compressed}
    tensors = {id(tensor): tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in replaced}
    return sum(
        tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize for tensor in tensors.values()
    )


def _fingerprint(source: Source, recipe: Recipe) -> str:
    """SHA-256 over the model's configuration, names and sizes of its weight files, the recipe, the version and those of plugins."""
    identity = source.identity() | {
        "recipe": recipe.fingerprint_json(),
        "version": package_version(),
    }
    foreign = {
        field: plugins.origin(points[0])
        for field, group in (("method", plugins.METHODS), ("calibration", plugins.CALIBRATION))
        if (points := plugins.installed(group).get(getattr(recipe, field).partition(":")[0]))
    }
    if foreign:
        identity["plugins"] = foreign
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _seconds(recipe: Recipe, requires: Statistic, weights: int, parameters: int) -> float:
    """A rough time on 2 cores: solving, and calibration where the method needs it."""
    seconds = weights / 1e6 * SECONDS_PER_MILLION_WEIGHTS.get(recipe.method, OTHER_SECONDS_PER_MILLION_WEIGHTS)
    if recipe.runs_text(requires):
        passes = SAMPLING_SLOWDOWN if recipe.calibration == "self" else 0.0
        passes += PASSES[recipe.inputs] * _streams(recipe, requires)
        tokens = recipe.samples * recipe.seq_len
        tuned = 3 * recipe.tune_block * min(BATCH, recipe.samples) * recipe.seq_len
        seconds += 2 * parameters * (tokens * passes + tuned) / FLOPS_PER_SECOND
    return seconds


def _streams(recipe: Recipe, requires: Statistic) -> int:
    """How many hidden states of each token are carried along: one, or the dense model's beside the compressed one's."""
    return 2 if recipe.corrects(requires) or recipe.tune_block else 1


def _peak_memory(recipe: Recipe, requires: Statistic, parameters: int, hidden_size: int, widest: int) -> int:
    """A rough peak: torch, the model in fp32 and as it is read, keys and values of sampled text, hidden states, Gram matrices."""
    runs = recipe.runs_text(requires)
    hidden = 2 * 4 * _streams(recipe, requires) * recipe.samples * recipe.seq_len * hidden_size if runs else 0
    gram = 48 * widest**2 if requires == Statistic.GRAM else 0
    sampling = CACHE_BYTES if runs and recipe.calibration == "self" else 0
    return 500_000_000 + 6 * parameters + sampling + hidden + gram
