"""Compression of a model decoder block by decoder block: calibrate, solve, write, free; what is finished is never done again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halfplate.calibration import BATCH, CalibrationTokens, input_stages
from halfplate.calibration.collect import StageSums
from halfplate.errors import HalfplateError
from halfplate.execution.clock import Clock
from halfplate.execution.engines import Engine
from halfplate.execution.hidden import Arguments, Batches, HiddenStates
from halfplate.execution.matrix import MatrixRecord
from halfplate.execution.progress import NO_FACTS, Report
from halfplate.execution.tasks import (
    BlockView,
    CollectSums,
    OpenBlocks,
    RunBlock,
    SolveMatrices,
    facts_of,
    load_sums,
    records_in,
    save_statistics,
)
from halfplate.execution.work import WorkFolder, load_part, remove_part, save_part
from halfplate.formats import CompressedLinear
from halfplate.formats.sharing import sharing_groups
from halfplate.models.sources import Source
from halfplate.planning import Plan
from halfplate.recovery.block import BlockTuning, TunedBlock, tune_block
from halfplate.statistics import InputStatistics, Statistic

DENSE, COMPRESSED = (
    "dense",
    "compressed",
)  # streams of hidden states: of the dense model, and through what is compressed


@dataclass(frozen=True)
class Outcome:
    """What became of each matrix, in the order of the plan, and of each block that was tuned."""

    records: list[MatrixRecord]
    tuned: dict[int, TunedBlock]


@dataclass
class Job:
    """One compression under way. source: with its tensors where they can be read one by one."""

    source: Source
    plan: Plan
    threads: int
    needed: Statistic
    tokens: CalibrationTokens | None
    work: WorkFolder
    engine: Engine
    blocks: OpenBlocks
    report: Report
    clock: Clock


def compress_blocks(job: Job) -> Outcome:
    """Leave every planned block as a part in the work folder, and say what became of each matrix.

    Blocks whose parts are whole stay; a damaged one is computed anew, from hidden states that run through those before it.
    """
    loop = _Loop(job)
    unfinished = [block for block in range(loop.last + 1) if not loop.finished(block)]
    loop.tell()
    for block in unfinished:
        loop.reach(block)
        loop.compress(block)
    return loop.outcome()


class _Loop:
    """The blocks of a job, one after the other."""

    def __init__(self, job: Job) -> None:
        self.job, self.recipe = job, job.plan.recipe
        self.method = self.recipe.create_method()
        self.names: dict[int, list[str]] = defaultdict(list)
        for matrix in job.plan.matrices:
            if matrix.spec is not None and matrix.block is not None:
                self.names[matrix.block].append(matrix.name)
        self.last = max(self.names)
        self.specs = job.plan.specs
        self.leaders = {name: group[0] for group in sharing_groups(self.specs) for name in group}
        self.weights = {name: spec.d_out * spec.d_in for name, spec in self.specs.items()}
        self.records: dict[str, MatrixRecord] = {}
        self.tuned: dict[int, TunedBlock] = {}
        self.limit = None if self.recipe.token_limit == "none" else self.recipe.token_limit
        self.corrected = self.recipe.corrects(job.needed)
        self.streams = self._streams()
        self.arguments: dict[int, Arguments] | None = None
        self.at = 0  # the block whose inputs the hidden states are

    def _streams(self) -> tuple[str, ...]:
        if self.job.tokens is None:
            return ()
        if self.recipe.inputs == "dense":
            return (DENSE,)
        return (COMPRESSED, DENSE) if self.corrected or self.recipe.tune_block else (COMPRESSED,)

    # What is there already.

    def finished(self, block: int) -> bool:
        """Whether the part of the block is whole; one that is not is removed."""
        part = load_part(self.job.work.block(block))
        if part is None or (damage := part.damaged()) is not None:
            if part is not None:
                self.job.report(
                    "checking", block + 1, self.last + 1, f"block {block} is damaged ({damage}), computed anew"
                )
            remove_part(self.job.work.block(block))
            return False
        self._remember(block, part.facts, records_in(part))
        return True

    def _remember(self, block: int, facts: dict[str, Any], records: list[MatrixRecord]) -> None:
        self.records |= {record.name: record for record in records}
        if facts.get("tuned") is not None:
            self.tuned[block] = TunedBlock(**facts["tuned"])

    def tell(self, facts: Mapping[str, Any] = NO_FACTS) -> None:
        share = sum(self.weights[name] for name in self.records) / sum(self.weights.values())
        self.job.report("compressing", len(self.records), len(self.specs), share=share, facts=facts)

    def outcome(self) -> Outcome:
        return Outcome([self.records[name] for name in self.specs], dict(sorted(self.tuned.items())))

    # Hidden states.

    def reach(self, block: int) -> None:
        """Bring the hidden states to the inputs of `block`, from the nearest block before it that they are known for."""
        if not self.streams:
            return
        with self.job.clock("statistics"):
            start = next((at for at in range(block, 0, -1) if at == self.at or self._whole(at)), 0)
            if start == 0 and not self._whole(0):
                self._embed()
            self._know_arguments()
            for at in range(start, block):
                self.advance(at)
                self._forget(at)
            self.at = block

    def _forget(self, block: int) -> None:
        for stream in self.streams:
            self._hidden(stream, block).remove()

    def _whole(self, block: int) -> bool:
        return all(self._hidden(stream, block).whole() for stream in self.streams)

    def _hidden(self, stream: str, block: int) -> HiddenStates:
        assert self.job.tokens is not None
        samples, length = self.job.tokens.ids.shape
        width = self.job.source.config.get_text_config().hidden_size
        # Before the first block all streams are one.
        return HiddenStates(self.job.work.hidden(stream if block else DENSE, block), (samples, length, width), BATCH)

    def _embed(self) -> None:
        assert self.job.tokens is not None
        streamed = self.job.blocks.model(self._view(0, {}))
        target = self._hidden(DENSE, 0)
        with streamed.outer(head=False):
            for number, ids in enumerate(self.job.tokens.ids.to(self.recipe.device).split(BATCH)):
                target.write(number, streamed.embed(ids).hidden)

    def _know_arguments(self) -> None:
        """The other arguments of every block for every size of batch; they do not depend on the tokens."""
        if self.arguments is not None:
            return
        assert self.job.tokens is not None
        streamed = self.job.blocks.model(self._view(0, {}))
        self.job.blocks.close()
        self.arguments = {block: {} for block in range(self.last + 1)}
        with streamed.outer(head=False):
            for size in {len(ids) for ids in self.job.tokens.ids.split(BATCH)}:
                inputs = streamed.embed(self.job.tokens.ids[:size].to(self.recipe.device))
                for block in self.arguments:
                    self.arguments[block][size] = inputs.arguments[block]

    def advance(self, block: int, streams: tuple[str, ...] | None = None, parts: dict[str, Path] | None = None) -> None:
        """Run the hidden states through a block, whose matrices lie in `parts`: by default that of the whole block."""
        assert self.arguments is not None
        streams = self.streams if streams is None else streams
        pairs = {stream: (self._hidden(stream, block), self._hidden(stream, block + 1)) for stream in streams}
        view, plain = self._view(block, self._parts(block) if parts is None else parts), (None, None)
        if COMPRESSED not in self.streams:
            # The one stream is the dense model's: no second copy of the block is needed.
            view, pairs = self._view(block, {}), {COMPRESSED: pairs[DENSE]}
        (hidden, out), (dense, dense_out) = (pairs.get(stream, plain) for stream in (COMPRESSED, DENSE))
        arguments = self.arguments[block]
        tasks = [RunBlock(view, hidden, out, dense, dense_out, arguments, numbers) for numbers in self._shares()]
        for _ in self.job.engine.run(tasks):
            pass

    def _parts(self, block: int) -> dict[str, Path]:
        return {name: self.job.work.block(block) for name in self.names[block]}

    def _shares(self) -> list[tuple[int, ...]]:
        """The batches for each task: all for one process; one by one where several share them."""
        batches = self._hidden(DENSE, 0).batches
        return [(number,) for number in range(batches)] if self.job.engine.elsewhere else [tuple(range(batches))]

    # One block.

    def compress(self, block: int) -> None:
        """Solve the matrices of a block, tune them if asked to, write its part, and take the hidden states past it."""
        done: dict[str, Path] = {}
        for stage, statistics in self._stages(block, done):
            with self.job.clock("solving"):
                self._solve(block, stage, statistics, done)
        tuned = self._tune(block, done) if self.recipe.tune_block and self.streams else None
        self._write(block, done, tuned)
        if self.streams and block < self.last:
            with self.job.clock("statistics"):
                # Tuning has had the dense ones already.
                self.advance(block, (COMPRESSED,) if tuned is not None else None)
            self.at = block + 1
        if self.streams:
            self._forget(block)
        for name in self.names[block]:
            remove_part(self.job.work.matrix(name))
        self.tell({"event": "block", "block": block} | ({} if tuned is None else asdict(tuned)))

    def _view(self, block: int, finished: dict[str, Path]) -> BlockView:
        job = self.job
        return BlockView(
            str(job.work.path),
            job.source,
            self.recipe.device,
            self.recipe.precision,
            job.threads,
            block,
            dict(finished),
        )

    def _stages(self, block: int, done: dict[str, Path]) -> Iterator[tuple[list[str], dict[str, InputStatistics]]]:
        """Linears of a block whose statistics can be had together, with these; what is compressed in between counts."""
        names = self.names[block]
        if not names or not self.streams:
            yield names, {}
            return
        stages = [names]
        if self.recipe.inputs == "compressed":
            with self.job.clock("statistics"):
                blockwise, _ = self.job.blocks.open(self._view(block, done), dense=DENSE in self.streams)
                stages = input_stages(blockwise, block, self._batches(COMPRESSED, block)[0], names)
        for stage in stages:
            found = {name: part for name in stage if (part := self._kept(name)) is not None}
            if len(found) == len(stage):
                done |= found
                continue
            with self.job.clock("statistics"):
                statistics = self._collect(block, stage, done)
            yield stage, statistics

    def _kept(self, name: str) -> Path | None:
        """The part of a matrix that was finished before the run was interrupted."""
        path = self.job.work.matrix(self.leaders[name])
        part = load_part(path)
        if part is None or part.damaged() is not None:
            return None
        self.records |= {record.name: record for record in records_in(part)}
        return path

    def _batches(self, stream: str, block: int) -> Batches:
        assert self.arguments is not None
        return Batches(self._hidden(stream, block), self.arguments[block], block, self.recipe.device)

    def _collect(self, block: int, stage: list[str], done: dict[str, Path]) -> dict[str, InputStatistics]:
        assert self.arguments is not None
        stream = COMPRESSED if COMPRESSED in self.streams else DENSE
        dense = self._hidden(DENSE, block) if self.corrected else None
        common = (
            self._view(block, done),
            tuple(stage),
            self.job.needed,
            self.limit,
            self._hidden(stream, block),
            dense,
        )
        if not self.job.engine.elsewhere:
            (sums,) = self.job.engine.run([CollectSums(*common, self.arguments[block])])
            found: StageSums = sums
            return found.statistics(stage)
        tasks = [
            CollectSums(
                *common, self.arguments[block], numbers, self.job.work.scratch / f"sums-{numbers[0]}.safetensors"
            )
            for numbers in self._shares()
        ]
        whole = StageSums()
        for path in self.job.engine.run(tasks):
            whole.merge(load_sums(path))
            remove_part(path)
        return whole.statistics(stage)

    def _solve(
        self, block: int, stage: Sequence[str], statistics: dict[str, InputStatistics], done: dict[str, Path]
    ) -> None:
        engine, view = self.job.engine, self._view(block, done)
        left = [name for name in stage if self.leaders[name] == name and self._kept(name) is None]
        given: dict[str, Any] = {name: statistics.get(name, InputStatistics()) for name in left}
        if engine.elsewhere:
            given = self._left_in_files(given)
        tasks = []
        for name in left:
            specs = {other: self.specs[other] for other in stage if self.leaders[other] == name}
            cost = float(sum(spec.d_out * spec.d_in * spec.d_in for spec in specs.values()))
            out = self.job.work.matrix(name)
            damping = self.recipe.cross_damping
            tasks.append(SolveMatrices(view, specs, self.method, damping, given.pop(name), out, cost))
        statistics.clear()
        for records in engine.run(tasks):
            for record in records:
                self.records[record.name] = record
                self.tell(record.facts() | {"block": block})
        done |= {name: self.job.work.matrix(self.leaders[name]) for name in stage}

    def _left_in_files(self, given: dict[str, InputStatistics]) -> dict[str, tuple[Path, str]]:
        """The statistics of each input once in a file, and where each matrix finds its own."""
        places: dict[str, tuple[Path, str]] = {}
        known: dict[int, tuple[Path, str]] = {}
        for name, statistics in given.items():
            if id(statistics) not in known:
                path = self.job.work.scratch / f"statistics-{len(known)}.safetensors"
                save_statistics(path, {name: statistics})
                known[id(statistics)] = (path, name)
            places[name] = known[id(statistics)]
        return places

    def _tune(self, block: int, done: dict[str, Path]) -> TunedBlock:
        with self.job.clock("statistics"):
            self.advance(block, (DENSE,), done)
        with self.job.clock("tuning"):
            blockwise, _ = self.job.blocks.open(self._view(block, done))
            targets = _Hidden(self._hidden(DENSE, block + 1), self.recipe.device)
            settings = BlockTuning(self.recipe.tune_block, seed=self.recipe.seed)
            return tune_block(blockwise, block, self._batches(COMPRESSED, block), targets, settings)

    def _write(self, block: int, done: dict[str, Path], tuned: TunedBlock | None) -> None:
        """The whole block as it will be stored, as a part."""
        dtype = self.job.source.other_dtype
        with self.job.clock("writing"):
            blockwise, _ = self.job.blocks.open(self._view(block, done))
            module, prefix = blockwise.blocks[block], f"{blockwise.prefix}.{block}"
            stored = {
                f"{prefix}.{name}.{key}"
                for name, linear in module.named_modules()
                if isinstance(linear, CompressedLinear)
                for key in linear.spec.layout()
            }
            tensors: dict[str, Tensor] = {}
            for name, tensor in module.state_dict(prefix=f"{prefix}.").items():
                kept = name in stored or not tensor.is_floating_point()
                tensors[name] = tensor if kept else finite(name, tensor.to(dtype))
            facts = facts_of([self.records[name] for name in self.names[block]], self.specs)
            facts["tuned"] = None if tuned is None else asdict(tuned)
            save_part(self.job.work.block(block), tensors, facts)
            self.job.blocks.mark(self._view(block, self._parts(block)))
            if tuned is not None:
                self.tuned[block] = tuned


def finite(name: str, tensor: Tensor) -> Tensor:
    """`tensor`; raises HalfplateError where its type could not hold a value."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise HalfplateError(
            f"{name} holds values that are not finite in {tensor.dtype}; choose a wider type or another method"
        )
    return tensor


class _Hidden(Sequence[Tensor]):
    """Hidden states batch by batch, read when they are asked for."""

    def __init__(self, states: HiddenStates, device: str) -> None:
        self._states, self._device = states, device

    def __len__(self) -> int:
        return self._states.batches

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._states.read(index).to(self._device)
