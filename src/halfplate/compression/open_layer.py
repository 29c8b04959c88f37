"""The compression state of a layer, and the layer that a process keeps in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from halfplate.compression.remembered import RememberedOutputs
from halfplate.engines.needs import Needs
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.formats.sharing import connect
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.linears import replace_module
from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.storage.artifact import load_artifact
from halfplate.storage.tensor_file import read_tensor


@dataclass(frozen=True)
class LayerView:
    """The state of a decoder layer: the model, the layer index, and the artifacts of its finished matrices.

    model: a name that no other model has.
    finished: the artifact of each finished matrix by its name; several matrices may share one artifact.
    precision: of matrix products while text runs through it.
    threads: of torch.
    remembered: bytes of outputs that may be kept for further passes.
    """

    model: str
    source: Source
    device: str
    precision: str
    threads: int
    index: int
    finished: Mapping[str, Path]
    remembered: int = 0

    def needs(self, memory: int) -> Needs:
        """The resources that a task on this layer needs."""
        return Needs(self.threads, int(torch.device(self.device).type == "cuda"), memory)


class OpenLayers:
    """The layer that a process keeps in memory, because the next task usually needs the same one.

    streamed, name: the model and its name, if it is already open.
    remembered: outputs of parts of the layer.
    """

    def __init__(self, streamed: StreamedModel | None = None, name: str = "") -> None:
        self._streamed, self._name = streamed, name
        self._index: int | None = None
        self._applied: dict[str, Path] = {}
        self._dense: nn.Module | None = None
        self.remembered = RememberedOutputs()

    def model(self, view: LayerView) -> StreamedModel:
        """The model of the view, without weights."""
        if self._streamed is None or self._name != view.model:
            self._streamed, self._name = StreamedModel(view.source, view.device, view.precision), view.model
            self._index, self._dense, self._applied = None, None, {}
            self.remembered.clear()
        return self._streamed

    def open(self, view: LayerView, dense: bool = False) -> tuple[BlockwiseModel, nn.Module | None]:
        """Load the layer of the view with its finished matrices. Returns the model, and with `dense` also the original layer."""
        streamed = self.model(view)
        self.remembered.room = view.remembered
        stale = any(view.finished.get(name) != path for name, path in self._applied.items())
        if self._index != view.index or stale or (dense and self._dense is None):
            self.close()
            layer = streamed.load_block(view.index)
            self._index, self._applied = view.index, {}
            self._dense = copy.deepcopy(layer) if dense else None
        new = {name: path for name, path in view.finished.items() if name not in self._applied}
        for name, path in new.items():
            _apply(streamed, name, path)
        if new:
            connect(streamed.model)
        self._applied |= new
        return streamed.blockwise, self._dense

    def mark(self, view: LayerView) -> None:
        """Declare that the loaded layer has the state `view`, because its matrices have just been written to these artifacts."""
        assert self._index == view.index
        assert self._applied.keys() == view.finished.keys()
        self._applied = dict(view.finished)

    def weight(self, view: LayerView, name: str) -> Tensor:
        """The original weight of the linear `name`, fp32 (d_out, d_in)."""
        streamed = self.model(view)
        if self._index == view.index and name not in self._applied:
            return cast(nn.Linear, streamed.model.get_submodule(name)).weight.detach()
        return streamed.read(f"{name}.weight")

    def close(self) -> None:
        """Free the memory of the layer."""
        if self._streamed is not None and self._index is not None:
            self._streamed.free_block(self._index)
        self._index, self._dense, self._applied = None, None, {}
        self.remembered.clear()


def _apply(streamed: StreamedModel, name: str, path: Path) -> None:
    # A matrix with the weight of an earlier layer is in the artifact of that one.
    model, owner = streamed.model, streamed.tied.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
    artifact = load_artifact(path)
    if artifact is None:
        raise HalfplateError(
            f"the artifact {str(path)!r} is damaged or missing; run the same command again with --resume"
        )
    bias = cast(nn.Linear, model.get_submodule(name)).bias
    spec = WeightSpec.from_json(artifact.facts["specs"][owner], owner)
    device = next(model.get_submodule(name).parameters()).device
    tensors = {key: read_tensor(artifact.tensors[f"{owner}.{key}"]).to(device) for key in spec.layout()}
    replace_module(model, name, CompressedLinear.from_stored(tensors, spec, bias))
