"""The calibration tokens on their way through the blocks, and what is learned from them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from halfplate.calibration import BATCH, input_stages
from halfplate.calibration.collect import StageSums
from halfplate.execution.hidden import Arguments, Batches, HiddenStates
from halfplate.execution.job import Job
from halfplate.execution.needs import memory_to_collect, memory_to_run
from halfplate.execution.tasks import CollectSums, RunBlock, load_sums
from halfplate.execution.token_arguments import TokenArguments
from halfplate.execution.work import remove_part
from halfplate.models.handover import BlockArguments, differing
from halfplate.statistics import InputStatistics

DENSE, COMPRESSED = "dense", "compressed"  # streams: of the dense model, and through what is compressed


class Streams:
    """The hidden states of the tokens before some block, in one stream or both; none where no text runs.

    names: the streams there are. corrected: whether cross moments between the two are collected.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.recipe = job, job.plan.recipe
        self.corrected = job.plan.job.corrects
        self.names = self._names()
        self._limit = None if self.recipe.token_limit == "none" else self.recipe.token_limit
        self._arguments: dict[int, Arguments] = {}
        self._reference: dict[int, Sequence[BlockArguments]] = {}
        self._own, self._embedded = TokenArguments(job.work.arguments), False
        self._at = 0  # the block whose inputs they are

    def _names(self) -> tuple[str, ...]:
        if self.job.tokens is None:
            return ()
        if self.recipe.inputs == "dense":
            return (DENSE,)
        return (COMPRESSED, DENSE) if self.job.plan.job.streams == 2 else (COMPRESSED,)

    def reach(self, block: int) -> None:
        """Bring them to the inputs of `block`, from the nearest block before it that they are known for."""
        start = next((at for at in range(block, 0, -1) if at == self._at or self._whole(at)), 0)
        self._know_arguments()
        if not (self._embedded or self._own.whole()) or (start == 0 and not self._whole(0)):
            self._embed()
            if start:
                self.forget(0)
        self._embedded = True
        for at in range(start, block):
            self.advance(at, self.job.parts(at))
            self.forget(at)
        self._at = block

    def pass_by(self, block: int, streams: tuple[str, ...] | None = None) -> None:
        """Take them from the inputs of `block` to its outputs, and forget the inputs; after the last block just forget."""
        if block < self.job.last:
            self.advance(block, self.job.parts(block), streams)
            self._at = block + 1
        self.forget(block)

    def forget(self, block: int) -> None:
        for stream in self.names:
            self.hidden(stream, block).remove()

    def _whole(self, block: int) -> bool:
        return all(self.hidden(stream, block).whole() for stream in self.names)

    def hidden(self, stream: str, block: int) -> HiddenStates:
        """The inputs of `block` in a stream."""
        # Before the first block all streams are one.
        return HiddenStates(self.job.work.hidden(stream if block else DENSE, block), self._shape, BATCH)

    @property
    def _shape(self) -> tuple[int, int, int]:
        assert self.job.tokens is not None
        samples, length = self.job.tokens.ids.shape
        return samples, length, self.job.source.config.get_text_config().hidden_size

    def batches(self, stream: str, block: int) -> Batches:
        """The same as inputs that the block can be called with."""
        return Batches(self.hidden(stream, block), self._arguments[block], block, self.recipe.device, own=self._own)

    def _embed(self) -> None:
        """The inputs of the first block, and the arguments of all blocks that depend on the tokens."""
        assert self.job.tokens is not None
        streamed = self.job.blocks.model(self.job.view(0, {}))
        target = self.hidden(DENSE, 0)
        with streamed.outer(head=False):
            for number, ids in enumerate(self.job.tokens.ids.to(self.recipe.device).split(BATCH)):
                inputs = streamed.embed(ids)
                target.write(number, inputs.hidden)
                self._own.write(number, differing(self._reference[len(ids)], inputs.all_arguments))
        self._own.finish(target.batches)

    def _know_arguments(self) -> None:
        """The other arguments of every block for every size of batch, those of the first tokens."""
        if self._arguments:
            return
        assert self.job.tokens is not None
        streamed = self.job.blocks.model(self.job.view(0, {}))
        self.job.blocks.close()
        with streamed.outer(head=False):
            for size in {len(ids) for ids in self.job.tokens.ids.split(BATCH)}:
                inputs = streamed.embed(self.job.tokens.ids[:size].to(self.recipe.device))
                self._reference[size] = inputs.all_arguments
        self._arguments = {
            block: {size: arguments[block] for size, arguments in self._reference.items()}
            for block in range(self.job.last + 1)
        }

    def advance(self, block: int, parts: Mapping[str, Path], streams: tuple[str, ...] | None = None) -> None:
        """Run them through a block, whose matrices lie in `parts`; streams: those in question, by default all."""
        streams = self.names if streams is None else streams
        pairs = {stream: (self.hidden(stream, block), self.hidden(stream, block + 1)) for stream in streams}
        view, plain = self.job.view(block, parts), (None, None)
        if COMPRESSED not in self.names:
            # The one stream is the dense model's: no second copy of the block is needed.
            view, pairs = self.job.view(block, {}), {COMPRESSED: pairs[DENSE]}
        (hidden, out), (dense, dense_out) = (pairs.get(stream, plain) for stream in (COMPRESSED, DENSE))
        arguments, memory = self._arguments[block], self._memory_to_run(block)
        tasks = [
            RunBlock(view, hidden, out, dense, dense_out, arguments, sum(chunks, ()), memory, self._own)
            for chunks in self._shares()
        ]
        for _ in self.job.engine.run(tasks):
            pass

    def _shares(self) -> list[tuple[tuple[int, ...], ...]]:
        """The chunks of batches for each task: all for one process; one by one where several share them."""
        chunks = self.hidden(DENSE, 0).chunks
        return [(chunk,) for chunk in chunks] if self.job.engine.elsewhere else [chunks]

    def _memory_to_run(self, block: int) -> int:
        _, length, width = self._shape
        return memory_to_run([self.job.plan.specs[name] for name in self.job.names[block]], BATCH * length * width)

    def stages(self, block: int, done: Mapping[str, Path]) -> list[list[str]]:
        """The linears of a block by what must be compressed before their inputs are final."""
        names = self.job.names[block]
        if self.recipe.inputs == "dense":
            return [names]
        blockwise, _ = self.job.blocks.open(self.job.view(block, done), dense=DENSE in self.names)
        return input_stages(blockwise, block, self.batches(COMPRESSED, block)[0], names)

    def collect(self, block: int, stage: list[str], done: Mapping[str, Path]) -> dict[str, InputStatistics]:
        """Statistics of the linears `stage` of a block in which the matrices in `done` are compressed."""
        hidden = self.hidden(COMPRESSED if COMPRESSED in self.names else DENSE, block)
        dense = self.hidden(DENSE, block) if self.corrected else None
        specs = [self.job.plan.specs[name] for name in stage]
        memory = self._memory_to_run(block) + memory_to_collect(specs, self.job.plan.job.statistic)
        tasks = [
            CollectSums(
                self.job.view(block, done),
                tuple(stage),
                self.job.plan.job.statistic,
                self._limit,
                hidden,
                dense,
                self._arguments[block],
                chunks,
                # No name is used twice: network storage may show an old file under it.
                self.job.work.scratch / f"sums-{stage[0]}-{chunks[0][0]}.safetensors"
                if self.job.engine.elsewhere
                else None,
                memory,
                self._own,
            )
            for chunks in self._shares()
        ]
        whole = StageSums()
        for found in self.job.engine.run(tasks):
            if isinstance(found, StageSums):
                whole.merge(found)
            else:
                whole.merge(load_sums(found))
                remove_part(found)
        return whole.statistics(stage)
