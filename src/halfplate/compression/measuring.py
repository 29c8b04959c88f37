"""Collecting the statistics that a transform depends on, layer by layer, in files that an interrupted run keeps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfplate.calibration import BATCH, CalibrationTokens
from halfplate.compression.first_inputs import Reference, reference_arguments, write_first_inputs
from halfplate.compression.hidden_states import Arguments, Batches, HiddenStates
from halfplate.compression.token_arguments import TokenArguments
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.streamed import StreamedModel
from halfplate.storage.artifact import Artifact, load_artifact, save_artifact
from halfplate.storage.tensor_file import StoredTensor, read_tensor
from halfplate.telemetry.progress import Report
from halfplate.transforms import MeasuredTransform, Statistics, WholeTransform


def measured(
    transform: MeasuredTransform,
    streamed: StreamedModel,
    tokens: CalibrationTokens,
    work: WorkFolder,
    number: int,
    report: Report,
) -> Statistics:
    """The statistics of each layer of `streamed` that the transform with this number in the plan asks for.

    One layer and one batch of hidden states are in memory, or the whole model for a `WholeTransform`. Finished layers are not run again,
    unless their hidden states were lost.
    """
    found = _Measuring(transform, streamed, tokens, work, number)
    if isinstance(transform, WholeTransform):
        found.run_whole(transform, report)
    else:
        found.run(report)
    return found.statistics


@dataclass
class _Measuring:
    transform: MeasuredTransform
    streamed: StreamedModel
    tokens: CalibrationTokens
    work: WorkFolder
    number: int

    def __post_init__(self) -> None:
        self._reference: Reference = {}
        self._own = TokenArguments(self.work.measuring(self.number, 0).with_name("arguments"))

    @torch.no_grad()
    def run(self, report: Report) -> None:
        """Measure the layers that are not finished."""
        layers = len(self.streamed.blocks)
        done = next((layer for layer in range(layers) if self._finished(layer) is None), layers)
        report("measuring", done, layers, self.transform.label)
        if done < layers:
            start = done if done and self._own.whole() and self._hidden(done).whole() else 0
            self._reference = reference_arguments(self.streamed, self.tokens.ids)
            if start == 0:
                write_first_inputs(self.streamed, self.tokens.ids, self._reference, self._hidden(0), self._own)
            for layer in range(start, layers):
                self._advance(layer, layer >= done)
                report("measuring", layer + 1, layers, self.transform.label)
        shutil.rmtree(self._hidden(0).path.parent, ignore_errors=True)

    def run_whole(self, transform: WholeTransform, report: Report) -> None:
        """Measure the whole model, unless all layers are finished."""
        layers, samples = len(self.streamed.blocks), len(self.tokens.ids)
        if all(self._finished(layer) is not None for layer in range(layers)):
            return
        report("measuring", 0, samples, transform.label)
        with self.streamed.running(held=True) as model, torch.enable_grad():
            torch.nn.Module.to(model, self.streamed.device)
            ids = self.tokens.ids.to(self.streamed.device)
            found = transform.measured(model, ids, lambda done: report("measuring", done, samples, transform.label))
        for layer, statistics in enumerate(found):
            save_artifact(self._file(layer), statistics, {})

    def statistics(self, layer: int) -> Mapping[str, Tensor]:
        """The statistics of a finished layer."""
        # Its checksums were compared when the run began.
        artifact = load_artifact(self._file(layer))
        if artifact is None:
            raise HalfplateError(
                f"the statistics in {str(self._file(layer))!r} are damaged; run the same command again with --resume"
            )
        return _Stored(artifact.tensors)

    def _finished(self, layer: int) -> Artifact | None:
        artifact = load_artifact(self._file(layer))
        return None if artifact is None or artifact.damaged() is not None else artifact

    def _file(self, layer: int) -> Path:
        return self.work.measured(self.number, layer)

    def _hidden(self, layer: int) -> HiddenStates:
        samples, length = self.tokens.ids.shape
        width = self.streamed.source.config.get_text_config().hidden_size
        return HiddenStates(self.work.measuring(self.number, layer), (samples, length, width), BATCH)

    def _advance(self, layer: int, measuring: bool) -> None:
        """Run all batches through a layer, and keep its statistics unless they are known."""
        arguments: Arguments = {size: found[layer] for size, found in self._reference.items()}
        hidden, following = self._hidden(layer), self._hidden(layer + 1)
        inputs = Batches(hidden, arguments, layer, str(self.streamed.device), own=self._own)
        block = self.streamed.load_block(layer)
        probe = self.transform.probe(self.streamed.source, layer) if measuring else None
        hooks = [] if probe is None else probe.watch(block)
        try:
            for number in range(hidden.batches):
                output = self.streamed.blockwise.run_block(layer, inputs[number])
                following.write(number, output.hidden, output.carried)
        finally:
            for hook in hooks:
                hook.remove()
            self.streamed.free_block(layer)
        if probe is not None:
            save_artifact(self._file(layer), probe.statistics(), {})
        hidden.remove()


class _Stored(Mapping[str, Tensor]):
    """Statistics that are read from their file when they are asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
