"""Arguments of layers that depend on the tokens and not only on their number, kept in files with the hidden states."""

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
    """The tensors that `differing` returns for every batch of tokens, in one artifact in `folder` per batch that has any."""

    folder: Path

    def write(self, number: int, found: Places) -> None:
        """Write the arguments of batch `number`."""
        if not found:
            return
        # Layers may share a tensor, which is stored once.
        names: dict[int, str] = {}
        for tensor in found.values():
            names.setdefault(id(tensor), str(len(names)))
        tensors = {names[id(tensor)]: tensor for tensor in found.values()}
        places = [[layer, place, names[id(tensor)]] for (layer, place), tensor in found.items()]
        save_artifact(self._file(number), tensors, {"places": places}, durable=False)

    def finish(self, batches: int) -> None:
        """Mark that all batches have been written."""
        kept = [number for number in range(batches) if self._file(number).exists()]
        write_json(self._done, {"kept": kept}, durable=False)

    def whole(self) -> bool:
        """Whether the arguments of every batch exist and are intact."""
        done = read_json(self._done)
        artifacts = [] if done is None else [load_artifact(self._file(number)) for number in done["kept"]]
        return done is not None and all(artifact is not None and artifact.damaged() is None for artifact in artifacts)

    def put_into(self, arguments: BlockArguments, number: int, layer: int) -> BlockArguments:
        """`arguments` of a layer with the tensors of batch `number` inserted."""
        if not self._file(number).exists():
            return arguments
        artifact = load_artifact(self._file(number))
        if artifact is None:
            raise HalfplateError(
                f"the artifact {str(self._file(number))!r} is damaged; run the same command again with --resume"
            )
        device = next((leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), "cpu")
        own = {
            place: read_tensor(artifact.tensors[name]).to(device)
            for at, place, name in artifact.facts["places"]
            if at == layer
        }
        return patched(arguments, own)

    @property
    def _done(self) -> Path:
        return self.folder / "done.json"

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
