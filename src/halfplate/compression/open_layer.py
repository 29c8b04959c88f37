"""A layer of the model as it is at some moment, and the one that a process has in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from halfplate.engines.needs import Needs
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.formats.sharing import connect
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.linears import replace_linear
from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.storage.artifact import load_artifact
from halfplate.storage.tensor_file import read_tensor


@dataclass(frozen=True)
class BlockView:
    """A decoder layer as it is at some moment: of which model, which one, and the parts that hold its finished matrices.

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
        """What a task on this layer takes."""
        return Needs(self.threads, int(torch.device(self.device).type == "cuda"), memory)


class OpenBlocks:
    """The layer that a process has in memory; the next task mostly wants the same.

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
        """The model with the layer of the view in it, its finished matrices in their places, and the layer as it was before if `dense` asks for it."""
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
        """The open layer is as the view says: its matrices have just been written to the parts named there."""
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
        """Free the memory of the layer."""
        if self._streamed is not None and self._index is not None:
            self._streamed.free_block(self._index)
        self._index, self._dense, self._applied = None, None, {}


def _apply(model: nn.Module, name: str, path: Path) -> None:
    part = load_artifact(path)
    if part is None:
        raise HalfplateError(f"the part {str(path)!r} is damaged or gone; run the same command again with --resume")
    bias = cast(nn.Linear, model.get_submodule(name)).bias
    spec = WeightSpec.from_json(part.facts["specs"][name], name)
    device = next(model.get_submodule(name).parameters()).device
    tensors = {key: read_tensor(part.tensors[f"{name}.{key}"]).to(device) for key in spec.layout()}
    replace_linear(model, name, CompressedLinear.from_stored(tensors, spec, bias))
