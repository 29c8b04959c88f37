"""The hidden states of the calibration tokens between layers, and the statistics collected from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfplate.calibration import BATCH, input_stages
from halfplate.calibration.collect import StageSums
from halfplate.calibration.experts import ORIGINAL, OWN, ExpertInputs
from halfplate.compression.experts import AllTokens, RecordExperts, SolveExpert
from halfplate.compression.first_inputs import Reference, reference_arguments, write_first_inputs
from halfplate.compression.hidden_states import Arguments, Batches, HiddenStates
from halfplate.compression.kept_statistics import load_sums
from halfplate.compression.open_layer import LayerView
from halfplate.compression.recorded_inputs import RecordedInputs
from halfplate.compression.run import Run
from halfplate.compression.task_memory import memory_to_collect, memory_to_run
from halfplate.compression.tasks import CollectSums, RecordInputs, RunLayer
from halfplate.compression.token_arguments import TokenArguments
from halfplate.engines.task import Task
from halfplate.models.experts import ExpertStage, expert_stages, experts_of
from halfplate.statistics import InputStatistics
from halfplate.storage.artifact import remove_artifact

DENSE, COMPRESSED = "dense", "compressed"  # streams: through the original layers, and through the compressed layers


class Streams:
    """The hidden states of the tokens before some layer, in one or two streams; none if the method needs no text.

    names: of the streams.
    corrected: whether cross moments between the two are collected.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.plan.recipe
        self.corrected = run.plan.job.corrects
        self.names = self._names()
        self._limit = None if self.recipe.token_limit == "none" else self.recipe.token_limit
        self._arguments: dict[int, Arguments] = {}
        self._reference: Reference = {}
        self._own, self._embedded = TokenArguments(run.work.arguments), False
        self._at = 0  # the layer whose inputs are known
        # The layer whose inputs in the original model are recorded, and the first linears of its stages, by layer.
        self._recorded: int | None = None
        self._leaders: dict[int, tuple[str, ...]] = {}
        # Statistics over all uses of the linears of a layer that later layers use, too, until they are asked for.
        self._over_uses: dict[str, InputStatistics] = {}

    def _names(self) -> tuple[str, ...]:
        if self.run.tokens is None:
            return ()
        if self.recipe.inputs == "dense":
            return (DENSE,)
        return (COMPRESSED, DENSE) if self.run.plan.job.streams == 2 else (COMPRESSED,)

    def reach(self, layer: int) -> None:
        """Compute the inputs of layer `layer`, starting at the nearest earlier layer whose inputs are known."""
        start = next((at for at in range(layer, 0, -1) if at == self._at or self._whole(at)), 0)
        self._know_arguments()
        if not (self._embedded or self._own.whole()) or (start == 0 and not self._whole(0)):
            self._embed()
            if start:
                self.forget(0)
        self._embedded = True
        for at in range(start, layer):
            self.advance(at, self.run.artifacts(at))
            self.forget(at)
        self._at = layer

    def pass_by(self, layer: int, streams: tuple[str, ...] | None = None) -> None:
        """Compute the outputs of layer `layer` and delete its inputs; after the last layer, only delete."""
        if layer < self.run.last:
            self.advance(layer, self.run.artifacts(layer), streams)
            self._at = layer + 1
        self.forget(layer)

    def forget(self, layer: int) -> None:
        for stream in self.names:
            self.hidden(stream, layer).remove()
        if self._recorded == layer:
            self._inputs(layer).remove()
            self._recorded = None

    def _whole(self, layer: int) -> bool:
        return all(self.hidden(stream, layer).whole() for stream in self.names)

    def hidden(self, stream: str, layer: int) -> HiddenStates:
        """The inputs of layer `layer` in a stream."""
        # Before the first layer, all streams are equal.
        return HiddenStates(self.run.work.hidden(stream if layer else DENSE, layer), self._shape, BATCH)

    @property
    def _shape(self) -> tuple[int, int, int]:
        assert self.run.tokens is not None
        samples, length = self.run.tokens.ids.shape
        return samples, length, self.run.source.config.get_text_config().hidden_size

    def batches(self, stream: str, layer: int) -> Batches:
        """The inputs of layer `layer`, ready to call it with."""
        return Batches(self.hidden(stream, layer), self._arguments[layer], layer, self.recipe.device, own=self._own)

    def _embed(self) -> None:
        """The inputs of the first layer, and the arguments of all layers that depend on the tokens."""
        assert self.run.tokens is not None
        streamed = self.run.layers.model(self.run.view(0, {}))
        write_first_inputs(streamed, self.run.tokens.ids, self._reference, self.hidden(DENSE, 0), self._own)

    def _know_arguments(self) -> None:
        """Store the other arguments of every layer for every batch size, computed with the first tokens."""
        if self._arguments:
            return
        assert self.run.tokens is not None
        streamed = self.run.layers.model(self.run.view(0, {}))
        self.run.layers.close()
        self._reference = reference_arguments(streamed, self.run.tokens.ids)
        self._arguments = {
            layer: {size: arguments[layer] for size, arguments in self._reference.items()}
            for layer in range(self.run.last + 1)
        }

    def advance(self, layer: int, artifacts: Mapping[str, Path], streams: tuple[str, ...] | None = None) -> None:
        """Run the hidden states through a layer with the matrices in `artifacts`. streams: all by default."""
        streams = self.names if streams is None else streams
        if self._recorded == layer:  # then the outputs of the original layer are known
            streams = tuple(stream for stream in streams if stream != DENSE)
        pairs = {stream: (self.hidden(stream, layer), self.hidden(stream, layer + 1)) for stream in streams}
        view, plain = self.run.view(layer, artifacts), (None, None)
        if COMPRESSED not in self.names:
            # The only stream is that of the original model, so no second copy of the layer is needed.
            view, pairs = self.run.view(layer, {}), {COMPRESSED: pairs[DENSE]}
        (hidden, out), (dense, dense_out) = (pairs.get(stream, plain) for stream in (COMPRESSED, DENSE))
        self._run_layer(view, hidden, out, dense, dense_out)

    def _run_layer(
        self,
        view: LayerView,
        hidden: HiddenStates | None,
        out: HiddenStates | None,
        dense: HiddenStates | None = None,
        dense_out: HiddenStates | None = None,
    ) -> None:
        """Run hidden states through a layer, as `RunLayer` does."""
        self._carry_out(
            RunLayer(hidden=hidden, out=out, dense=dense, dense_out=dense_out, **self._shared(view, chunks))
            for chunks in self._shares()
        )

    def _carry_out(self, tasks: Iterable[Task]) -> None:
        """Wait for tasks whose results are in files."""
        for _ in self.run.engine.run(list(tasks)):
            pass

    def _shares(self) -> list[tuple[tuple[int, ...], ...]]:
        """The chunks of batches of each task: one task with all chunks for one process, one task per chunk for several."""
        chunks = self.hidden(DENSE, 0).chunks
        return [(chunk,) for chunk in chunks] if self.run.engine.elsewhere else [chunks]

    def _shared(self, view: LayerView, chunks: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
        """The fields of `OverBatches` for a task that runs `chunks` through a layer."""
        return {
            "view": view,
            "arguments": self._arguments[view.index],
            "numbers": sum(chunks, ()),
            "memory": self._memory_to_run(view.index),
            "own": self._own,
        }

    def _memory_to_run(self, layer: int) -> int:
        _, length, width = self._shape
        specs = [self.run.plan.specs[name] for name in self.run.names[layer]]
        return memory_to_run(specs, BATCH * length * width) + self.run.plan.memory.remembered

    def stages(self, layer: int, done: Mapping[str, Path]) -> list[list[str] | ExpertStage]:
        """The linears of a layer in groups, in the order in which their inputs become final; all experts of a module are one."""
        experts = self.expert_stages(layer)
        inside = {name for stage in experts.values() for name in stage.names}
        names = [name for name in self.run.names[layer] if name not in inside]
        if self.recipe.inputs == "dense":
            return [*([names] if names else []), *experts.values()]
        blockwise, _ = self.run.layers.open(self.run.view(layer, done))
        found: list[list[str] | ExpertStage] = []
        for stage in input_stages(blockwise, layer, self.batches(COMPRESSED, layer)[0], [*names, *experts]):
            plain = [name for name in stage if name not in experts]
            found += [plain] if plain else []
            found += [experts[name] for name in stage if name in experts]
        self._leaders[layer] = tuple(stage[0] for stage in found if not isinstance(stage, ExpertStage))
        return found

    def _inputs(self, layer: int) -> RecordedInputs:
        """The inputs of the linears of layer `layer` in the original model."""
        return RecordedInputs(self.run.work.hidden("inputs", layer), self.hidden(DENSE, layer).batches)

    def _record(self, layer: int) -> RecordedInputs:
        """Run the original stream through layer `layer` once, and record the inputs of every stage."""
        inputs = self._inputs(layer)
        if self._recorded != layer:
            view, names = self.run.view(layer, {}), self._leaders[layer]
            # Nothing reads the outputs of the last layer, except tuning.
            last = layer == self.run.last and not self.recipe.tune_block
            hidden, out = self.hidden(DENSE, layer), None if last else self.hidden(DENSE, layer + 1)
            self._carry_out(
                RecordInputs(names=names, dense=hidden, inputs=inputs, out=out, **self._shared(view, chunks))
                for chunks in self._shares()
            )
            self._recorded = layer
        return inputs

    def _view(self, layer: int, done: Mapping[str, Path]) -> LayerView:
        """The layer whose inputs are collected: with the matrices in `done`, or the original one if its inputs are those of the original model."""
        return self.run.view(layer, {} if self.recipe.inputs == "dense" else done)

    def expert_stages(self, layer: int) -> dict[str, ExpertStage]:
        """The experts of a layer, by module."""
        model = self.run.layers.model(self.run.view(layer, {})).model
        return expert_stages(self.run.names[layer], list(experts_of(model)))

    def expert_tasks(
        self, layer: int, stage: ExpertStage, done: Mapping[str, Path], left: Sequence[int]
    ) -> list[SolveExpert]:
        """Record the inputs of the experts of a layer in which the matrices in `done` are compressed; returns the tasks of the experts `left`."""
        hidden = self.hidden(COMPRESSED if COMPRESSED in self.names else DENSE, layer)
        dense = self.hidden(DENSE, layer) if self.corrected else None
        view, job, engine = self._view(layer, done), self.run.plan.job, self.run.engine
        memory = self._memory_to_run(layer)
        inputs = ExpertInputs(
            self.run.work.experts(stage.module),
            hidden.batches,
            (OWN,) if dense is None else (OWN, ORIGINAL),
            self.recipe.expert_tokens == "gated",
        )
        self._carry_out(
            RecordExperts(module=stage.module, hidden=hidden, dense=dense, inputs=inputs, **self._shared(view, chunks))
            for chunks in self._shares()
        )
        out = self.run.work.scratch / f"all-{stage.module}.safetensors" if engine.elsewhere else None
        (everything,) = engine.run([AllTokens(view, stage.module, inputs, job.statistic, self._limit, out, memory)])
        return [
            SolveExpert(
                view,
                stage.module,
                number,
                {name: self.run.plan.specs[name] for name in stage.experts[number]},
                job.method,
                self.recipe.cross_damping,
                inputs,
                everything,
                job.statistic,
                self._limit,
                self.recipe.inputs == "compressed",
                self.run.work.matrix(stage.unit(number)),
            )
            for number in left
        ]

    def collect(self, layer: int, stage: list[str], done: Mapping[str, Path]) -> dict[str, InputStatistics]:
        """Statistics of the linears `stage` of a layer in which the matrices in `done` are compressed.

        Those of linears that later layers use, too, are over all their uses.
        """
        shared = [name for name in self.run.names[layer] if name in self.run.uses]
        if not self._over_uses.keys() >= set(stage) & set(shared):
            self._over_uses = self._collect_over_uses(layer, shared)
        found = {name: self._over_uses.pop(name) for name in stage if name in self._over_uses}
        if own := [name for name in stage if name not in found]:
            hidden = self.hidden(COMPRESSED if COMPRESSED in self.names else DENSE, layer)
            dense = self._record(layer) if self.corrected else None
            found |= self._sums(self._view(layer, done), own, hidden, dense).statistics(own)
        return {name: found[name] for name in stage}

    def _collect_over_uses(self, layer: int, names: Sequence[str]) -> dict[str, InputStatistics]:
        """Statistics of linears that later layers use, too. From this layer on, the text runs through the original model."""
        uses: dict[int, dict[str, str]] = {layer: {name: name for name in names}}
        for owner in names:
            for at, name in self.run.uses[owner].items():
                uses.setdefault(at, {})[name] = owner
        hidden, whole = self.hidden(COMPRESSED if COMPRESSED in self.names else DENSE, layer), StageSums()
        for at in range(layer, min(max(uses), self.run.last) + 1):
            if at > layer:
                before, hidden = hidden, HiddenStates(self.run.work.hidden("shared", at), self._shape, BATCH)
                self._run_layer(self.run.view(at - 1, {}), before, hidden)
                if at > layer + 1:
                    before.remove()
            if at in uses:
                sums = self._sums(self.run.view(at, {}), list(uses[at]), hidden, None, names)
                whole.merge(sums.renamed(uses[at]))
        if max(uses) > layer:
            hidden.remove()
        return whole.statistics(names)

    def _sums(
        self,
        view: LayerView,
        names: Sequence[str],
        hidden: HiddenStates,
        dense: RecordedInputs | None,
        planned: Sequence[str] | None = None,
    ) -> StageSums:
        """Sums over the inputs of the linears `names` of a layer. planned: the matrices whose sums they are, if they have other names."""
        layer, specs = view.index, [self.run.plan.specs[name] for name in planned or names]
        memory = self._memory_to_run(layer) + memory_to_collect(specs, self.run.plan.job.statistic)
        tasks = [
            CollectSums(
                view,
                tuple(names),
                self.run.plan.job.statistic,
                self._limit,
                hidden,
                dense,
                self._arguments[layer],
                chunks,
                # Names are not reused, because network storage may show an old file.
                self.run.work.scratch / f"sums-{names[0]}-{chunks[0][0]}.safetensors"
                if self.run.engine.elsewhere
                else None,
                memory,
                self._own,
            )
            for chunks in self._shares()
        ]
        whole = StageSums()
        for found in self.run.engine.run(tasks):
            if isinstance(found, StageSums):
                whole.merge(found)
            else:
                whole.merge(load_sums(found))
                remove_artifact(found)
        return whole
