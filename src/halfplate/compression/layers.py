"""Compression of a model, one decoder layer at a time: calibrate, solve, write, free. Finished work is not repeated."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from halfplate.compression.hidden_states import HiddenStates
from halfplate.compression.kept_statistics import save_statistics
from halfplate.compression.run import Run
from halfplate.compression.streams import COMPRESSED, DENSE, Streams
from halfplate.compression.tasks import SolveMatrices, facts_of, records_in
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear
from halfplate.formats.sharing import sharing_groups
from halfplate.methods.solving import MatrixRecord
from halfplate.models.experts import ExpertStage
from halfplate.recovery.block import BlockTuning, TunedBlock, tune_block
from halfplate.statistics import InputStatistics
from halfplate.storage.artifact import Artifact, load_artifact, remove_artifact, save_artifact
from halfplate.telemetry.progress import NO_FACTS

AHEAD = 2  # queued matrices per worker; with more, no further layer is started


@dataclass(frozen=True)
class Outcome:
    """The result for each matrix, in the order of the plan, and for each tuned layer."""

    records: list[MatrixRecord]
    tuned: dict[int, TunedBlock]


def compress_layers(run: Run) -> Outcome:
    """Write every planned layer to an artifact in the work folder, and return the result for each matrix.

    Intact artifacts are kept. A damaged layer is computed again, from hidden states that run through the layers before it.
    """
    loop = _Loop(run)
    unfinished = [layer for layer in range(loop.last + 1) if not loop.finished(layer)]
    loop.tell()
    begun: deque[_Begun] = deque()
    for layer in unfinished:
        begun.append(loop.begin(layer))
        while begun and loop.enough(begun):
            loop.finish(begun.popleft())
    for one in begun:
        loop.finish(one)
    return loop.outcome()


@dataclass
class _Begun:
    """A layer whose matrices are being solved.

    done: the artifact of each matrix, including matrices that are not solved yet.
    solving: the records of each task.
    files: of statistics, removed when all matrices are solved.
    folders: of the inputs of experts, removed then, too.
    matrices: number of matrices that may still be queued.
    """

    layer: int
    done: dict[str, Path] = field(default_factory=dict)
    solving: list[Iterator[list[MatrixRecord]]] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)
    folders: set[Path] = field(default_factory=set)
    matrices: int = 0


class _Loop:
    """Processes the layers of a run in order."""

    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.plan.recipe
        self.method = run.plan.job.method
        self.names, self.last, self.specs = run.names, run.last, run.plan.layer_specs
        self.leaders = {name: group[0] for group in sharing_groups(self.specs) for name in group}
        # What is solved as one and written to one artifact: the matrices that share a wrapper, or those of an expert.
        self.units = dict(self.leaders)
        self.weights = {name: spec.d_out * spec.d_in for name, spec in self.specs.items()}
        self.records: dict[str, MatrixRecord] = {}
        self.tuned: dict[int, TunedBlock] = {}
        self.streams = Streams(run)
        # Whether the statistics of a layer do not depend on the matrices of the previous layer, and other processes solve these.
        self.apart = run.engine.elsewhere and COMPRESSED not in self.streams.names

    # Finished work.

    def finished(self, layer: int) -> bool:
        """Whether the artifact of the layer is intact; a damaged one is removed."""
        artifact = load_artifact(self.run.work.layer(layer))
        if artifact is None or (damage := self._damage(artifact)) is not None:
            if artifact is not None:
                self.run.report(
                    "checking", layer + 1, self.last + 1, f"layer {layer} is damaged ({damage}) and is computed again"
                )
            remove_artifact(self.run.work.layer(layer))
            return False
        self._remember(layer, artifact.facts, records_in(artifact))
        return True

    def _damage(self, artifact: Artifact) -> str | None:
        """The damage of an artifact, or None. An artifact with other formats is useless, because the chosen formats were lost and chosen again."""
        specs = artifact.facts["specs"]
        other = next((name for name, spec in specs.items() if spec != self.specs[name].to_json()), None)
        return artifact.damaged() if other is None else f"{other} has another candidate"

    def _remember(self, layer: int, facts: dict[str, Any], records: list[MatrixRecord]) -> None:
        self.records |= {record.name: record for record in records}
        if facts.get("tuned") is not None:
            self.tuned[layer] = TunedBlock(**facts["tuned"])

    def tell(self, facts: Mapping[str, Any] = NO_FACTS) -> None:
        share = sum(self.weights[name] for name in self.records) / sum(self.weights.values())
        self.run.report("compressing", len(self.records), len(self.specs), share=share, facts=facts)

    def outcome(self) -> Outcome:
        owners = {name: owner for owner, uses in self.run.uses.items() for name in uses.values()}
        placed = (name for name in self.run.plan.specs if name in self.specs or name in owners)
        records = [replace(self.records[owners.get(name, name)], name=name) for name in placed]
        records += self.run.tables
        return Outcome(records, dict(sorted(self.tuned.items())))

    # One layer.

    def begin(self, layer: int) -> _Begun:
        """Collect the statistics of a layer and start solving its matrices. On return they are solved, unless other processes solve them."""
        begun = _Begun(layer, self.run.borrowed(layer))
        if self.streams.names:
            with self.run.clock("statistics"):
                self.streams.reach(layer)
        for stage, statistics in self._stages(layer, begun.done):
            if isinstance(stage, ExpertStage):
                self._solve_experts(begun, stage)
            with self.run.clock("solving"):
                if not isinstance(stage, ExpertStage):
                    self._solve(begun, stage, statistics)
                if not self.apart:
                    self._settle(begun)
        if self.apart and self.streams.names:
            with self.run.clock("statistics"):
                self.streams.pass_by(layer)
        return begun

    def enough(self, begun: Sequence[_Begun]) -> bool:
        """Whether to finish the first of these layers before the next one begins."""
        return not self.apart or sum(one.matrices for one in begun) > AHEAD * self.run.engine.workers

    def finish(self, begun: _Begun) -> None:
        """Wait for the matrices of a layer, tune them if the recipe says so, write its artifact, and run the hidden states through it."""
        layer = begun.layer
        with self.run.clock("solving"):
            self._settle(begun)
        tuned = self._tune(layer, begun.done) if self.recipe.tune_block and self.streams.names else None
        self._write(layer, begun.done, tuned)
        if self.streams.names and not self.apart:
            with self.run.clock("statistics"):
                # Tuning has already computed the original hidden states.
                self.streams.pass_by(layer, (COMPRESSED,) if tuned is not None else None)
        for name in self.names[layer]:
            remove_artifact(self.run.work.matrix(self.units[name]))
        self.tell({"event": "block", "block": layer} | ({} if tuned is None else asdict(tuned)))

    def _stages(
        self, layer: int, done: dict[str, Path]
    ) -> Iterator[tuple[list[str] | ExpertStage, dict[str, InputStatistics]]]:
        """Groups of linears of a layer, each with its statistics, which are collected after the earlier groups are compressed.

        Experts have none, because each one collects its own.
        """
        names = self.names[layer]
        if not names or not self.streams.names:
            yield names, {}
            return
        for experts in self.streams.expert_stages(layer).values():
            self.units |= {name: experts.unit(number) for number, own in experts.experts.items() for name in own}
        with self.run.clock("statistics"):
            stages = self.streams.stages(layer, done)
        for stage in stages:
            if isinstance(stage, ExpertStage):
                yield stage, {}
                continue
            found = {name: artifact for name in stage if (artifact := self._kept(name)) is not None}
            if len(found) == len(stage):
                done |= found
                continue
            with self.run.clock("statistics"):
                statistics = self.streams.collect(layer, stage, done)
            yield stage, statistics

    def _kept(self, name: str) -> Path | None:
        """The artifact of a matrix that was finished before the run was interrupted; None if there is none."""
        path = self.run.work.matrix(self.units[name])
        artifact = load_artifact(path)
        if artifact is None or self._damage(artifact) is not None:
            return None
        self.records |= {record.name: record for record in records_in(artifact)}
        return path

    def _solve(self, begun: _Begun, stage: Sequence[str], statistics: dict[str, InputStatistics]) -> None:
        """Submit the matrices `stage` to the engine."""
        engine, view = self.run.engine, self.run.view(begun.layer, begun.done)
        left = [name for name in stage if self.leaders[name] == name and self._kept(name) is None]
        given: dict[str, Any] = {name: statistics.get(name, InputStatistics()) for name in left}
        if engine.elsewhere:
            given = self._left_in_files(given)
            begun.files |= {path for path, _ in given.values()}
        tasks = []
        for name in left:
            specs = {other: self.specs[other] for other in stage if self.leaders[other] == name}
            out, damping = self.run.work.matrix(name), self.recipe.cross_damping
            tasks.append(SolveMatrices(view, specs, self.method, damping, given.pop(name), out))
        statistics.clear()
        begun.solving.append(engine.run(tasks))
        begun.matrices += len(tasks)
        begun.done |= {name: self.run.work.matrix(self.leaders[name]) for name in stage}

    def _solve_experts(self, begun: _Begun, stage: ExpertStage) -> None:
        """Submit the experts of a module to the engine; those that were finished before an interruption are kept."""
        left = [number for number, names in stage.experts.items() if self._kept(names[0]) is None]
        if left:
            with self.run.clock("statistics"):
                tasks = self.streams.expert_tasks(begun.layer, stage, begun.done, left)
            begun.folders.add(self.run.work.experts(stage.module))
            begun.files |= {task.everything[0] for task in tasks if isinstance(task.everything, tuple)}
            begun.solving.append(self.run.engine.run(tasks))
            begun.matrices += len(stage.names)
        begun.done |= {name: self.run.work.matrix(self.units[name]) for name in stage.names}

    def _settle(self, begun: _Begun) -> None:
        """Wait for the matrices that the engine solves."""
        for results in begun.solving:
            for records in results:
                for record in records:
                    self.records[record.name] = record
                    self.tell(record.facts() | {"block": begun.layer})
        for path in begun.files:
            remove_artifact(path)
        for folder in begun.folders:
            shutil.rmtree(folder, ignore_errors=True)
        begun.solving, begun.files, begun.folders = [], set(), set()

    def _left_in_files(self, given: dict[str, InputStatistics]) -> dict[str, tuple[Path, str]]:
        """Write the statistics of each input to a file once, and return the file for each matrix."""
        places: dict[str, tuple[Path, str]] = {}
        known: dict[int, tuple[Path, str]] = {}
        for name, statistics in given.items():
            if id(statistics) not in known:
                # Names are not reused, because network storage may show an old file.
                path = self.run.work.scratch / f"statistics-{name}.safetensors"
                save_statistics(path, {name: statistics})
                known[id(statistics)] = (path, name)
            places[name] = known[id(statistics)]
        return places

    def _tune(self, layer: int, done: dict[str, Path]) -> TunedBlock:
        with self.run.clock("statistics"):
            self.streams.advance(layer, done, (DENSE,))
        with self.run.clock("tuning"):
            blockwise, _ = self.run.layers.open(self.run.view(layer, done))
            targets = _Hidden(self.streams.hidden(DENSE, layer + 1), self.recipe.device)
            settings = BlockTuning(self.recipe.tune_block, seed=self.recipe.seed)
            self.run.layers.remembered.clear()  # tuning changes its outputs
            return tune_block(blockwise, layer, self.streams.batches(COMPRESSED, layer), targets, settings)

    def _write(self, layer: int, done: dict[str, Path], tuned: TunedBlock | None) -> None:
        """Write the whole layer, as it will be stored, to an artifact."""
        dtype = self.run.source.other_dtype
        with self.run.clock("writing"):
            blockwise, _ = self.run.layers.open(self.run.view(layer, done))
            module, prefix = blockwise.blocks[layer], f"{blockwise.prefix}.{layer}"
            stored = {
                f"{prefix}.{name}.{key}"
                for name, linear in module.named_modules()
                if isinstance(linear, CompressedLinear)
                for key in linear.spec.layout()
            }
            tensors: dict[str, Tensor] = {}
            shared = self.run.layers.model(self.run.view(layer, done)).tied
            lent = tuple(f"{name}." for name in self.run.borrowed(layer))
            for name, tensor in module.state_dict(prefix=f"{prefix}.").items():
                if name in shared or name.startswith(lent):
                    continue  # stored with the layer that has it first
                kept = name in stored or not tensor.is_floating_point()
                tensors[name] = tensor if kept else finite(name, tensor.to(dtype))
            facts = facts_of([self.records[name] for name in self.names[layer]], self.specs)
            facts["tuned"] = None if tuned is None else asdict(tuned)
            save_artifact(self.run.work.layer(layer), tensors, facts)
            self.run.layers.mark(self.run.view(layer, self.run.artifacts(layer)))
            if tuned is not None:
                self.tuned[layer] = tuned


def finite(name: str, tensor: Tensor) -> Tensor:
    """Return `tensor`; raises HalfplateError if its type cannot hold one of its values."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise HalfplateError(
            f"{name} holds values that are not finite in {tensor.dtype}; choose a wider type or another method"
        )
    return tensor


class _Hidden(Sequence[Tensor]):
    """Hidden states batch by batch, read on demand."""

    def __init__(self, states: HiddenStates, device: str) -> None:
        self._states, self._device = states, device

    def __len__(self) -> int:
        return self._states.batches

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._states.read(index).to(self._device)
