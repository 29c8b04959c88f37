"""Loading any model of the command line: an original model, or a Halfplate checkpoint."""

from pathlib import Path
from typing import Any

from halfplate.checkpoint.config import read_record
from halfplate.checkpoint.read import load, load_tokenizer
from halfplate.errors import HalfplateError
from halfplate.models.sources import is_compressed, load_dense


def load_any(
    name: str, device: str = "cpu", activations: str = "auto", fit: int | str | None = None
) -> tuple[Any, Any]:
    """The model, for computing in fp32, and the tokenizer of a checkpoint, a folder, a `.gguf` file or a Hub id.

    activations: as in `halfplate.load`; `int8` is only for a checkpoint.
    fit: as in `halfplate.load`.
    Raises HalfplateError on bad input.
    """
    if is_compressed(name):
        return load(name, device=device, activations=activations, fit=fit), load_tokenizer(name)
    if fit is not None:
        raise HalfplateError(
            f"fit={fit!r} is for checkpoints of method bitstack, and {name!r} is not one; leave it out"
        )
    check_activations(name, activations)
    loaded = load_dense(name, device)
    return loaded.model, loaded.tokenizer


def check_activations(name: str, activations: str) -> None:
    """Raise HalfplateError for `int8` of an original model."""
    if activations == "int8":
        raise HalfplateError(
            f"activations={activations!r} is for Halfplate checkpoints, and {name!r} is not one; leave it out"
        )


def calibration_seed(name: str) -> int | None:
    """The calibration seed of a checkpoint; None for an original model or a method without calibration."""
    if not is_compressed(name):
        return None
    protocol = read_record(Path(name)).get("calibration")
    seed = protocol.get("seed") if isinstance(protocol, dict) else None
    return seed if isinstance(seed, int) else None
