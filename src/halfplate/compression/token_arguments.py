"""Arguments of layers that depend on the tokens and not on their number alone, kept in files beside the hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils._pytree import tree_leaves

from halfplate.errors import HalfplateError
from halfplate.models.handover import BlockArguments, Places, patched
from halfplate.storage.artifact import load_artifact, read_json, save_artifact, write_json
from halfplate.storage.tensor_file import read_tensor


@dataclass(frozen=True)
class TokenArguments:
    """What `differing` finds for every batch of the tokens, one part a batch that has any; `folder` holds them all."""

    folder: Path

    def write(self, number: int, found: Places) -> None:
        """Keep those of batch `number`."""
        if not found:
            return
        # Layers may share a tensor: it lies there once.
        names: dict[int, str] = {}
        for tensor in found.values():
            names.setdefault(id(tensor), str(len(names)))
        tensors = {names[id(tensor)]: tensor for tensor in found.values()}
        places = [[block, place, names[id(tensor)]] for (block, place), tensor in found.items()]
        save_artifact(self._file(number), tensors, {"places": places}, durable=False)

    def finish(self, batches: int) -> None:
        """All batches have been written."""
        kept = [number for number in range(batches) if self._file(number).exists()]
        write_json(self._done, {"kept": kept}, durable=False)

    def whole(self) -> bool:
        """Whether those of every batch are there, undamaged."""
        done = read_json(self._done)
        parts = [] if done is None else [load_artifact(self._file(number)) for number in done["kept"]]
        return done is not None and all(part is not None and part.damaged() is None for part in parts)

    def put_into(self, arguments: BlockArguments, number: int, block: int) -> BlockArguments:
        """`arguments` of a layer as they are for batch `number`."""
        if not self._file(number).exists():
            return arguments
        part = load_artifact(self._file(number))
        if part is None:
            raise HalfplateError(
                f"the part {str(self._file(number))!r} is damaged; run the same command again with --resume"
            )
        device = next((leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), "cpu")
        own = {
            place: read_tensor(part.tensors[name]).to(device) for at, place, name in part.facts["places"] if at == block
        }
        return patched(arguments, own)

    @property
    def _done(self) -> Path:
        return self.folder / "done.json"

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
