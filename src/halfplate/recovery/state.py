"""The saved state of a recovery: one file, written atomically and without pickle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.storage.atomic import whole_file
from halfplate.storage.tensor_file import DamagedFile, read_header, read_metadata, read_tensors, write_file

VERSION = 1
FILE = "state.safetensors"


@dataclass(frozen=True)
class State:
    """tensors: by name, on the CPU.
    facts: JSON; `identity` says which recovery the state belongs to.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_state(folder: Path, state: State, file: str = FILE) -> None:
    """Write `state` to `folder`, atomically replacing an earlier one; raises HalfplateError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = json.dumps({"version": VERSION} | state.facts, sort_keys=True)
        with whole_file(folder / file, durable=True) as partial:
            write_file(partial, state.tensors, metadata={"state": facts})
    except OSError as error:
        raise HalfplateError(
            f"the state in {str(folder)!r} could not be written ({' '.join(str(error).split())}); "
            "free some space and continue with --resume from the previous save, which is intact"
        ) from error


def load_state(folder: Path, identity: dict[str, Any], file: str = FILE) -> State | None:
    """The state in `folder`, None if there is none; raises HalfplateError if it is damaged or belongs to another recovery."""
    path = folder / file
    if not path.exists():
        return None
    try:
        tensors = dict(read_tensors(read_header(path)))
        facts = json.loads(read_metadata(path)["state"])
        version, found = facts["version"], facts["identity"]
    except (OSError, DamagedFile, ValueError, KeyError, TypeError) as error:
        raise HalfplateError(
            f"{str(path)!r} is damaged ({' '.join(str(getattr(error, 'reason', error)).split())}); delete it, or pass --overwrite to start over"
        ) from None
    if version != VERSION:
        raise HalfplateError(f"{str(path)!r} has version {version}, expected {VERSION}; pass --overwrite to start over")
    for name in sorted(identity.keys() | found.keys()):
        if found.get(name) != identity.get(name):
            raise HalfplateError(
                f"--resume: {name} was {found.get(name)!r} when the recovery in {str(folder)!r} began and is {identity.get(name)!r} "
                "now; give the same again, or pass --overwrite to start over"
            )
    return State(tensors, facts)
