"""The pieces of work that engines hand to processes: each reads what it needs from files and gives the same result anywhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from halfplate.calibration import DenseRun
from halfplate.calibration.collect import StageSums, Sums, stage_sums
from halfplate.errors import HalfplateError
from halfplate.execution.heap import trim
from halfplate.execution.hidden import Arguments, Batches, HiddenStates
from halfplate.execution.matrix import MatrixRecord, solve_matrices
from halfplate.execution.needs import Needs, memory_to_solve
from halfplate.execution.token_arguments import TokenArguments
from halfplate.execution.work import Part, load_part, save_part
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.formats.linear import assembled
from halfplate.formats.sharing import connect
from halfplate.methods.base import Method
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.linears import replace_linear
from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.statistics import InputStatistics, Statistic
from halfplate.storage.tensor_file import read_tensor


@dataclass(frozen=True)
class BlockView:
    """A decoder block as it is at some moment: of which model, which one, and the parts that hold its finished matrices.

    model: a name that no other model has. finished: the part of each matrix that is done, by the matrix's name; several may
    lie in one part. precision: of products while text runs through it. threads: of torch.
    """

    model: str
    source: Source
    device: str
    precision: str
    threads: int
    index: int
    finished: Mapping[str, Path]

    def needs(self, memory: int) -> Needs:
        """What a task on this block takes."""
        return Needs(self.threads, int(torch.device(self.device).type == "cuda"), memory)


class OpenBlocks:
    """The block that a process has in memory; the next task mostly wants the same.

    streamed, name: the model that its views are of, where it is open already.
    """

    def __init__(self, streamed: StreamedModel | None = None, name: str = "") -> None:
        self._streamed, self._name = streamed, name
        self._index: int | None = None
        self._applied: dict[str, Path] = {}
        self._dense: nn.Module | None = None

    def model(self, view: BlockView) -> StreamedModel:
        """The model of the view, without weights."""
        if self._streamed is None or self._name != view.model:
            self._streamed, self._name = StreamedModel(view.source, view.device, view.precision), view.model
            self._index, self._dense, self._applied = None, None, {}
        return self._streamed

    def open(self, view: BlockView, dense: bool = False) -> tuple[BlockwiseModel, nn.Module | None]:
        """The model with the block of the view in it, its finished matrices in their places, and the block as it was before if `dense` asks for it."""
        streamed = self.model(view)
        stale = any(view.finished.get(name) != path for name, path in self._applied.items())
        if self._index != view.index or stale or (dense and self._dense is None):
            self.close()
            block = streamed.load_block(view.index)
            self._index, self._applied = view.index, {}
            self._dense = copy.deepcopy(block) if dense else None
        new = {name: path for name, path in view.finished.items() if name not in self._applied}
        for name, path in new.items():
            _apply(streamed.model, name, path)
        if new:
            connect(streamed.model)
        self._applied |= new
        return streamed.blockwise, self._dense

    def mark(self, view: BlockView) -> None:
        """The open block is as the view says: its matrices have just been written to the parts named there."""
        assert self._index == view.index
        assert self._applied.keys() == view.finished.keys()
        self._applied = dict(view.finished)

    def weight(self, view: BlockView, name: str) -> Tensor:
        """The dense weight of the linear `name`, fp32 (d_out, d_in)."""
        streamed = self.model(view)
        if self._index == view.index and name not in self._applied:
            return cast(nn.Linear, streamed.model.get_submodule(name)).weight.detach()
        return streamed.read(f"{name}.weight")

    def close(self) -> None:
        """Free the memory of the block."""
        if self._streamed is not None and self._index is not None:
            self._streamed.free_block(self._index)
        self._index, self._dense, self._applied = None, None, {}


def _apply(model: nn.Module, name: str, path: Path) -> None:
    part = load_part(path)
    if part is None:
        raise HalfplateError(f"the part {str(path)!r} is damaged or gone; run the same command again with --resume")
    bias = cast(nn.Linear, model.get_submodule(name)).bias
    spec = WeightSpec.from_json(part.facts["specs"][name], name)
    device = next(model.get_submodule(name).parameters()).device
    tensors = {key: read_tensor(part.tensors[f"{name}.{key}"]).to(device) for key in spec.layout()}
    replace_linear(model, name, CompressedLinear.from_stored(tensors, spec, bias))


class Task(Protocol):
    """What an engine runs. cost: for deciding what goes first."""

    @property
    def cost(self) -> float: ...

    @property
    def needs(self) -> Needs: ...

    def run(self, blocks: OpenBlocks) -> object:
        """Do it, with the block that this process has open."""


@dataclass(frozen=True)
class CollectSums:
    """Sums over some chunks of batches of what reaches the linears `names` of a block.

    dense: where the block's inputs in the dense model lie, if cross moments are wanted. chunks: the batches of each; those of one
    are summed by themselves, and then the chunks in their order. out: a part to leave the sums in, for a process whose memory the
    caller does not see. memory: bytes. own: arguments that depend on the tokens.
    """

    view: BlockView
    names: tuple[str, ...]
    statistic: Statistic
    token_limit: float | None
    hidden: HiddenStates
    dense: HiddenStates | None
    arguments: Arguments
    chunks: tuple[tuple[int, ...], ...]
    out: Path | None = None
    memory: int = 0
    own: TokenArguments | None = None

    @property
    def cost(self) -> float:
        return float(sum(map(len, self.chunks)))

    @property
    def needs(self) -> Needs:
        return self.view.needs(self.memory)

    @torch.no_grad()
    def run(self, blocks: OpenBlocks) -> StageSums | Path:
        trim()
        torch.set_num_threads(self.view.threads)
        blockwise, before = blocks.open(self.view, dense=self.dense is not None)
        sums = StageSums()
        with assembled(blockwise.blocks[self.view.index]):
            for chunk in self.chunks:
                sums.merge(self._sums(blockwise, before, chunk))
        if self.out is None:
            return sums
        save_sums(self.out, sums)
        return self.out

    def _sums(self, blockwise: BlockwiseModel, before: nn.Module | None, chunk: tuple[int, ...]) -> StageSums:
        def batches(hidden: HiddenStates) -> Batches:
            return Batches(hidden, self.arguments, self.view.index, self.view.device, chunk, self.own)

        dense = None if self.dense is None or before is None else DenseRun(before, batches(self.dense))
        inputs = batches(self.hidden)
        return stage_sums(blockwise, self.view.index, inputs, self.names, self.statistic, dense, self.token_limit)


@dataclass(frozen=True)
class SolveMatrices:
    """Solve one matrix, or all that share a wrapper, and leave them in a part; gives back their records.

    statistics: as they are, or the part that `save_statistics` wrote, with the name of the input's leader.
    """

    view: BlockView
    specs: Mapping[str, WeightSpec]
    method: Method
    cross_damping: float | Literal["none"]
    statistics: InputStatistics | tuple[Path, str]
    out: Path

    @property
    def cost(self) -> float:
        return float(sum(spec.d_out * spec.d_in * spec.d_in for spec in self.specs.values()))

    @property
    def needs(self) -> Needs:
        return self.view.needs(memory_to_solve(self.method, self.specs.values()))

    @torch.no_grad()
    def run(self, blocks: OpenBlocks) -> list[MatrixRecord]:
        trim()
        torch.set_num_threads(self.view.threads)
        statistics = self.statistics
        if not isinstance(statistics, InputStatistics):
            statistics = load_statistics(*statistics, self.view.device)
        names = list(self.specs)
        weights = [blocks.weight(self.view, name) for name in names]
        solved, records = solve_matrices(names, weights, self.method, statistics, self.specs, self.cross_damping)
        tensors = {
            f"{name}.{key}": tensor
            for name, compressed in zip(names, solved, strict=True)
            for key, tensor in compressed.tensors().items()
            if key in self.specs[name].layout()
        }
        save_part(self.out, tensors, facts_of(records, self.specs), durable=False)
        return records


@dataclass(frozen=True)
class RunBlock:
    """Take some batches through a block: from `hidden` to `out`, and through the dense block from `dense` to `dense_out`.

    memory: bytes. own: arguments that depend on the tokens.
    """

    view: BlockView
    hidden: HiddenStates | None
    out: HiddenStates | None
    dense: HiddenStates | None
    dense_out: HiddenStates | None
    arguments: Arguments
    numbers: tuple[int, ...]
    memory: int = 0
    own: TokenArguments | None = None

    @property
    def cost(self) -> float:
        return float(len(self.numbers))

    @property
    def needs(self) -> Needs:
        return self.view.needs(self.memory)

    @torch.no_grad()
    def run(self, blocks: OpenBlocks) -> None:
        trim()
        torch.set_num_threads(self.view.threads)
        blockwise, before = blocks.open(self.view, dense=self.dense is not None)
        for source, target, module in ((self.hidden, self.out, None), (self.dense, self.dense_out, before)):
            if source is None or target is None:
                continue
            batches = Batches(source, self.arguments, self.view.index, self.view.device, self.numbers, self.own)
            with assembled(blockwise.blocks[self.view.index] if module is None else module):
                for position, number in enumerate(self.numbers):
                    after = blockwise.run_block(self.view.index, batches[position], module)
                    target.write(number, after.hidden, after.carried)


def facts_of(records: list[MatrixRecord], specs: Mapping[str, WeightSpec]) -> dict[str, object]:
    """What a part says of its matrices."""
    return {
        "specs": {record.name: specs[record.name].to_json() for record in records},
        "records": {record.name: record.to_json() | {"seconds": record.seconds} for record in records},
    }


def records_in(part: Part) -> list[MatrixRecord]:
    """The records of the matrices in a part."""
    return [MatrixRecord.from_json(name, entry) for name, entry in part.facts["records"].items()]


def save_sums(path: Path, sums: StageSums) -> None:
    """Leave sums in a part."""
    tensors: dict[str, Tensor] = {}
    for leader, found in sums.sums.items():
        if found.squares is not None:
            tensors[f"{leader}:squares"] = found.squares
        for key, tensor in (("products", found.products), ("crosses", found.crosses)):
            if tensor is not None:
                tensors[f"{leader}:{key}"] = tensor
    tokens = {leader: found.tokens for leader, found in sums.sums.items()}
    save_part(path, tensors, {"leaders": sums.leaders, "tokens": tokens}, durable=False)


def load_sums(path: Path) -> StageSums:
    """What `save_sums` left."""
    part = _whole(path)

    def tensor(name: str) -> Tensor | None:
        return read_tensor(part.tensors[name]) if name in part.tensors else None

    sums = {
        leader: Sums(tokens, *(tensor(f"{leader}:{key}") for key in ("squares", "products", "crosses")))
        for leader, tokens in part.facts["tokens"].items()
    }
    return StageSums(dict(part.facts["leaders"]), sums)


def save_statistics(path: Path, statistics: Mapping[str, InputStatistics]) -> None:
    """Leave the statistics of some inputs in a part, by the names of their leaders."""
    tensors = {
        f"{leader}:{key}": tensor
        for leader, found in statistics.items()
        for key, tensor in (("diagonal", found.diagonal), ("gram", found.gram), ("cross", found.cross))
        if tensor is not None
    }
    tokens = {leader: found.tokens for leader, found in statistics.items()}
    save_part(path, tensors, {"tokens": tokens}, durable=False)


def load_statistics(path: Path, leader: str, device: str) -> InputStatistics:
    """Those of one input."""
    part = _whole(path)
    found = {
        key: read_tensor(part.tensors[name]).to(device)
        for key in ("diagonal", "gram", "cross")
        if (name := f"{leader}:{key}") in part.tensors
    }
    return InputStatistics(part.facts["tokens"][leader], **found)


def _whole(path: Path) -> Part:
    part = load_part(path)
    if part is None:
        raise HalfplateError(
            f"the file {str(path)!r} is damaged or cannot be seen from this machine; put OUT where every machine sees it, and use --resume"
        )
    return part
