"""The programs that a result is made for: the formats that each stores exactly and runs fast, and the bytes that they take there.

To add one: write a line in `TARGETS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.formats.spec import WeightSpec
from halfplate.models.gguf_blocks import WIDTH, block_type
from halfplate.models.gguf_families.table import family_of_model
from halfplate.models.gguf_super_blocks import WIDTH as SUPER_WIDTH
from halfplate.pattern import DENSE

# A core_dtype and its columns per scale; None for those of the recipe.
Core = tuple[str, int | None]
# Without those that lose more than another one of the same bytes, that have no kernel (minima), or that take several times as long to
# solve for at most 6 % of the bytes (super-scales).
OWN_CORES = ("bf16", "int8", "int6", "nl5", "nl4", "nl3", "int2")
TABLE_CORES = ("int8", "int6", "int5", "nl5", "int4", "nl4")
FLOAT_BITS = 16  # of a weight that is multiplied out
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.+)")
GROUPS = (32, 64, 128)  # that kernels of vLLM and GPTQModel have
# Matrices that vLLM joins, and whose formats must be equal.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Target:
    """A program that runs the result.

    name: a value of `target`.
    spoken: the file of the result, for messages.
    cores: the candidates of a matrix of `spec`, and tables: those of an embedding or a head; none if these stay floats.
    bits: per weight of a matrix, scales included; None if it does not hold it exactly.
    tied: the names of matrices that must have one format, in groups; all names are in one.
    sparse: whether it runs N:M patterns and wrappers.
    experts: whether its files hold experts.
    """

    name: str
    spoken: str
    cores: Callable[[WeightSpec], Sequence[Core]]
    tables: Callable[[WeightSpec], Sequence[Core]]
    bits: Callable[[WeightSpec], float | None]
    tied: Callable[[Iterable[str]], list[list[str]]]
    sparse: bool = False
    experts: bool = True

    def nbytes(self, spec: WeightSpec) -> int:
        """Bytes of a matrix in the file; 0 if another module stores it."""
        if self.sparse or spec.same_as is not None:
            return spec.nbytes
        bits = self.bits(spec)
        return int(spec.d_out * spec.d_in * (FLOAT_BITS if bits is None else bits) / 8)

    def holds(self, spec: WeightSpec) -> bool:
        """Whether it stores a matrix exactly."""
        return self.bits(spec) is not None

    def check_core(self, core_dtype: str, group: int, pattern: str, block_size: object) -> None:
        """Raise HalfplateError if no matrix of these settings can be stored."""
        if self.sparse:
            return
        if pattern != "dense" or block_size != 0:
            raise HalfplateError(
                f"target={self.name!r} holds unpruned cores without wrappers, received pattern={pattern!r} and block_size={block_size!r}; "
                "leave them out, or use target halfplate"
            )
        wide = WeightSpec(SUPER_WIDTH, SUPER_WIDTH, DENSE, core_dtype, group=group)
        if not self.holds(wide):
            names = ", ".join(dict.fromkeys(core for core, _ in self.cores(wide)))
            raise HalfplateError(
                f"target={self.name!r} cannot hold core_dtype={core_dtype!r} in groups of {group}; use one of {names}"
            )

    def check_model(self, model_type: str, names: Iterable[str]) -> None:
        """Raise HalfplateError if the file cannot hold a model with matrices of these names."""
        if self.name == GGUF.name:
            family_of_model(model_type)
        if not self.experts and (name := next(filter(EXPERT.fullmatch, names), None)) is not None:
            raise HalfplateError(f"target={self.name!r} cannot hold experts ({name}); use target gguf or halfplate")

    def check_table(self, field: str, dtype: str, group: int) -> None:
        """Raise HalfplateError if an embedding or an output layer of this type (`field` of a recipe) cannot be stored."""
        wide = WeightSpec(SUPER_WIDTH, SUPER_WIDTH, DENSE, "int8", group=group)
        if not self.tables(wide):
            raise HalfplateError(
                f"{field}={dtype!r}: target={self.name!r} holds the embedding and the output layer as floats; use {field}='keep'"
            )
        if dtype != "auto" and not self.holds(replace(wide, core_dtype=dtype)):
            raise HalfplateError(
                f"{field}={dtype!r} in groups of {group} is not held by target={self.name!r}; use auto"
            )


def _gguf_cores(spec: WeightSpec) -> Sequence[Core]:
    """Types of llama.cpp by their quantizers; K types hold the same bits with less error, where blocks of 256 fit."""
    if spec.d_in % SUPER_WIDTH == 0:
        supers = (("int6k", 16), ("affine5k", 32), ("affine4k", 32), ("nl4s", 32), ("int3k", 16), ("affine2k", 16))
        return (("int8", 32), ("nl4", 32), ("int4", 32), *supers)
    if spec.d_in % WIDTH == 0:
        return tuple((core, 32) for core in ("int8", "affine5", "int5", "affine4", "nl4", "int4"))
    return ()


def _gguf_tables(spec: WeightSpec) -> Sequence[Core]:
    if spec.d_in % SUPER_WIDTH == 0:
        return (("int8", 32), ("int6k", 16), ("affine4k", 32), ("nl4", 32))
    return (("int8", 32), ("int5", 32), ("nl4", 32)) if spec.d_in % WIDTH == 0 else ()


def _gguf_bits(spec: WeightSpec) -> float | None:
    kind = block_type(spec)
    return None if kind is None else kind.bits


def _words(
    cores: Sequence[str], rows: int, zeros: bool
) -> tuple[Callable[[WeightSpec], Sequence[Core]], Callable[[WeightSpec], float | None]]:
    """`cores` and `bits` of a format of int32 words, symmetric and with groups of 32, 64 or 128.

    rows: number that must divide d_out. zeros: whether zero points and the group of each column are stored, too.
    """

    def bits(spec: WeightSpec) -> float | None:
        if spec.core_dtype not in cores or spec.group not in GROUPS or spec.d_in % spec.group or spec.d_out % rows:
            return None
        code = QUANTIZERS.get(spec.core_dtype).bits
        return code + (FLOAT_BITS + code * zeros) / spec.group + 32 * zeros / spec.d_out

    def offered(spec: WeightSpec) -> Sequence[Core]:
        fitting = [group for group in GROUPS if spec.d_in % group == 0 and spec.d_out % rows == 0]
        return tuple((core, group) for core in cores for group in fitting)

    return offered, bits


def _mlx_cores(spec: WeightSpec) -> Sequence[Core]:
    """MLX stores a minimum for every group, so those of values around 0 save nothing."""
    fitting = [
        group for group in GROUPS[:2] if spec.d_in % group == 0
    ]  # 128 saves a quarter of a bit, for half as many measurements more
    cores = ("affine2", "affine3", "affine4", "affine5", "int6", "int8")
    return tuple((core, group) for core in cores for group in fitting)


def _mlx_tables(spec: WeightSpec) -> Sequence[Core]:
    return tuple((core, group) for core, group in _mlx_cores(spec) if core in ("affine4", "int6", "int8"))


def _mlx_bits(spec: WeightSpec) -> float | None:
    own = spec.core_dtype in QUANTIZERS.own and spec.core_dtype.startswith(("affine", "int", "nl"))
    if not own or spec.group not in GROUPS or spec.d_in % spec.group:
        return None
    code = 8 if spec.core_dtype.startswith("nl") else QUANTIZERS.get(spec.core_dtype).bits
    return code + 2 * FLOAT_BITS / spec.group


def _alone(names: Iterable[str]) -> list[list[str]]:
    return [[name] for name in names]


def _stacked(names: Iterable[str]) -> list[list[str]]:
    """The experts of a layer that one tensor of a GGUF file holds."""
    return _grouped(names, lambda name: "/".join(match.groups()) if (match := EXPERT.fullmatch(name)) else name)


def _fused(names: Iterable[str]) -> list[list[str]]:
    """The matrices that vLLM joins."""

    def key(name: str) -> str:
        parent, _, leaf = name.rpartition(".")
        return next((f"{parent}/{'+'.join(joined)}" for joined in JOINED if leaf in joined), name)

    return _grouped(names, key)


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def _own_cores(spec: WeightSpec) -> Sequence[Core]:
    return tuple((core, None) for core in (*OWN_CORES, *(name for name in QUANTIZERS if name not in QUANTIZERS.own)))


HALFPLATE = Target(
    "halfplate",
    "checkpoint",
    _own_cores,
    lambda spec: tuple((core, None) for core in TABLE_CORES),
    lambda spec: 8 * spec.nbytes / (spec.d_out * spec.d_in),
    _alone,
    sparse=True,
)
GGUF = Target("gguf", "GGUF file", _gguf_cores, _gguf_tables, _gguf_bits, _stacked)
_VLLM, _GPTQ = _words(("int4", "int8"), 1, False), _words(("int2", "int3", "int4", "int8"), 32, True)
VLLM = Target("vllm", "folder of compressed-tensors", _VLLM[0], lambda spec: (), _VLLM[1], _fused, experts=False)
GPTQ = Target("gptq", "folder of GPTQ", _GPTQ[0], lambda spec: (), _GPTQ[1], _fused, experts=False)
MLX = Target("mlx", "folder of MLX", _mlx_cores, _mlx_tables, _mlx_bits, _alone, experts=False)
TARGETS = {target.name: target for target in (HALFPLATE, GGUF, VLLM, GPTQ, MLX)}
