"""An original model on disk, whose decoder layers are loaded one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfplate.errors import HalfplateError
from halfplate.formats.plain import is_plain_linear
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.conv1d import shapes_in_files, transposed_weights
from halfplate.models.data_reads import stated_reads
from halfplate.models.fit import check_complete, match, shared_names
from halfplate.models.sources import Source, skeleton
from halfplate.storage.tensor_file import DamagedFile, StoredTensor, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamedModel:
    """The modules of a model without their weights, and the locations of these in files.

    model: in eval mode, its parameters on the meta device but for those that are loaded. Tensors are read in fp32 to
    `device`; precision: as in BlockwiseModel. `stored` names each tensor of the model as `state_dict` does; `tied` maps a name to that of the tensor it shares.
    decoded: what reads a tensor that is not to come from the files, by its name.
    Raises HalfplateError for tensors that are missing from the files or of another shape than the configuration asks for.
    """

    def __init__(self, source: Source, device: str = "cpu", precision: str = "fp32") -> None:
        self.source, self.device = source, torch.device(device)
        self.model = skeleton(source, buffers=True)
        self.blockwise = BlockwiseModel(self.model, precision)
        self.prefix, self.blocks = self.blockwise.prefix, self.blockwise.blocks
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        self._transposed: frozenset[str] = frozenset()
        if not source.in_model_form:
            expected, self._transposed = shapes_in_files(self.model), transposed_weights(self.model)
        found = _named_as_in_model(self.model, source)
        self.tied = shared_names(self.model, expected, found)
        self.stored = {name: found[name] for name in expected if name in found and name not in self.tied}
        check_complete(source.name, self.model, expected, self.stored.keys() | self.tied.keys(), found)
        self.decoded: dict[str, Callable[[], Tensor]] = {}
        self._empty = list(self.blocks)

    def read(self, name: str) -> Tensor:
        """The tensor of the full name `name`, floats as fp32; raises HalfplateError if it holds NaN or inf."""
        name = self.tied.get(name, name)
        if name in self.decoded:
            return self.decoded[name]().to(self.device)
        try:
            tensor = read_tensor(self.stored[name])
            tensor = tensor.T.contiguous() if name in self._transposed else tensor
        except (OSError, DamagedFile) as error:
            raise HalfplateError(
                f"model={self.source.name!r}: {name} cannot be read ({' '.join(str(error).split())}); check that the model is still there"
            ) from error
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32)
            # Minimum and maximum are NaN if any value is.
            if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):
                nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
                raise HalfplateError(
                    f"model={self.source.name!r}: {name} holds {nan} NaN and {inf} inf among {tensor.numel()} values, expected finite weights; "
                    "download the model again"
                )
        return tensor.to(self.device)

    def block_names(self, index: int) -> list[str]:
        """The stored tensors of layer `index`, in the order of the model."""
        return [name for name in self.stored if name.startswith(f"{self.prefix}.{index}.")]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the stored tensor `name` in the model."""
        shape = self.stored[name].shape
        return shape[::-1] if name in self._transposed else shape

    @property
    def outer_names(self) -> list[str]:
        """The stored tensors outside the layers."""
        return [name for name in self.stored if not name.startswith(f"{self.prefix}.")]

    def load_block(self, index: int) -> nn.Module:
        """Load layer `index` into the model; `free_block` frees it."""
        block = copy.deepcopy(self._empty[index])
        self._fill(block, index)
        self.blocks[index] = block
        return block

    def free_block(self, index: int) -> None:
        """Free the memory of the layer and of everything that was put into it."""
        self.blocks[index] = self._empty[index]

    @contextmanager
    def outer(self, head: bool) -> Iterator[None]:
        """Context manager that loads all weights outside the layers. head: also the output embedding, if it has its own tensor."""
        output = self.model.get_output_embeddings()
        heads = {name for name, module in self.model.named_modules() if module is output}
        names = [name for name in self.outer_names if head or name.rpartition(".")[0] not in heads]
        empty = dict(self.model.named_parameters(remove_duplicate=False))
        for name in names:
            _put(self.model, name, self.read(name))
        for name, shared in self.tied.items():
            if shared in names:
                _put(self.model, name, self.model.get_parameter(shared))
        try:
            yield
        finally:
            for name, parameter in empty.items():
                if not name.startswith(f"{self.prefix}."):
                    _put(self.model, name, parameter)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> BlockInputs:
        """`BlockwiseModel.embed`; everything outside the layers except the head must be loaded (`outer`)."""
        # Each runs once, to see what layers of its class return.
        unknown = self.blockwise.unknown_blocks()
        for index in unknown:
            self.load_block(index)
        try:
            return self.blockwise.embed(ids)
        finally:
            for index in unknown:
                self.free_block(index)

    @contextmanager
    def running(
        self, held: bool, pack: Callable[[nn.Linear], nn.Module] | None = None, with_head: bool = True
    ) -> Iterator[PreTrainedModel]:
        """Context manager in which the model can run as a whole.

        held: keep the layers in memory; otherwise each layer is read before it runs and freed afterwards.
        pack: returns the module that runs instead of a linear of a held model.
        with_head: also load the output embedding.
        """
        hooks: list[RemovableHandle] = []
        head: Any = self.model.get_output_embeddings()
        # Not `set_output_embeddings`, which in some models also expects a bias that is a parameter.
        heads = [name for name, module in self.model.named_modules() if module is head]
        with self.outer(head=with_head):
            try:
                for index, block in enumerate(self._empty):
                    if held:
                        block = self.load_block(index)
                        if pack is not None:
                            _replace_modules(block, pack)
                    else:
                        hooks.append(block.register_forward_pre_hook(self._filling(index)))
                        hooks.append(block.register_forward_hook(_emptying(dict(block.named_parameters()))))
                if held and pack is not None and head is not None and is_plain_linear(head):
                    packed = pack(head)
                    for name in heads:
                        self.model.set_submodule(name, packed)
                yield self.model
            finally:
                for hook in hooks:
                    hook.remove()
                for index in range(len(self._empty)):
                    self.free_block(index)
                if head is not None:
                    for name in heads:
                        self.model.set_submodule(name, head)

    def _filling(self, index: int) -> Callable[..., None]:
        def fill(block: nn.Module, *_: Any) -> None:
            if any(parameter.is_meta for parameter in block.parameters()):
                self._fill(block, index)

        return fill

    def _fill(self, block: nn.Module, index: int) -> None:
        prefix = f"{self.prefix}.{index}."
        # With those that it shares with another layer, whose linears are not compressed.
        for name in [*self.block_names(index), *(name for name in self.tied if name.startswith(prefix))]:
            _put(block, name.removeprefix(prefix), self.read(name))


def _replace_modules(block: nn.Module, pack: Callable[[nn.Linear], nn.Module]) -> None:
    read = stated_reads(block)
    for name, module in list(block.named_modules()):
        if is_plain_linear(module) and name not in read:
            block.set_submodule(name, pack(module))


def _emptying(empty: dict[str, nn.Parameter]) -> Callable[..., None]:
    def free(block: nn.Module, *_: Any) -> None:
        for name, parameter in empty.items():
            _put(block, name, parameter)

    return free


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer `name` below `module`."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )


def _named_as_in_model(model: PreTrainedModel, source: Source) -> dict[str, StoredTensor]:
    if source.in_model_form:
        return dict(source.tensors)
    return dict(match(model, source.tensors).found)
