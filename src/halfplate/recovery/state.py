"""What an interrupted recovery goes on from: one file, written whole or not at all, without pickle."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfplate.errors import HalfplateError

VERSION = 1
FILE = "state.safetensors"


@dataclass(frozen=True)
class State:
    """tensors: by name, on the CPU. facts: JSON, of which `identity` says what the state belongs to."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_state(folder: Path, state: State, file: str = FILE) -> None:
    """Write `state` to `folder`, replacing what is there only once it is whole; raises HalfplateError where it cannot."""
    partial = folder / f".{file}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = json.dumps({"version": VERSION} | state.facts, sort_keys=True)
        save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, partial, {"state": facts})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(folder / file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise HalfplateError(
            f"the state in {str(folder)!r} could not be written ({' '.join(str(error).split())}); "
            "free some space and go on with --resume from the one before, which is whole"
        ) from error


def load_state(folder: Path, identity: dict[str, Any], file: str = FILE) -> State | None:
    """The state in `folder`, None where there is none; raises HalfplateError where it is damaged or of another identity."""
    path = folder / file
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as opened:
            facts = json.loads((opened.metadata() or {})["state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        version, found = facts["version"], facts["identity"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise HalfplateError(
            f"{str(path)!r} is damaged ({' '.join(str(error).split())}); delete it, or pass --overwrite to start afresh"
        ) from None
    if version != VERSION:
        raise HalfplateError(
            f"{str(path)!r} has version {version}, expected {VERSION}; pass --overwrite to start afresh"
        )
    for name in sorted(identity.keys() | found.keys()):
        if found.get(name) != identity.get(name):
            raise HalfplateError(
                f"--resume: {name} was {found.get(name)!r} when the recovery in {str(folder)!r} began and is {identity.get(name)!r} "
                "now; give the same again, or pass --overwrite to start afresh"
            )
    return State(tensors, facts)
