"""Any model the command line takes: dense, or a Halfplate checkpoint."""

from pathlib import Path
from typing import Any

from halfplate.checkpoint.config import read_record
from halfplate.checkpoint.read import load, load_tokenizer
from halfplate.models.sources import is_compressed, load_dense


def load_any(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """The model, for computing in fp32, and the tokenizer of a checkpoint, a folder, a `.gguf` file or a Hub id.

    Raises HalfplateError on bad input.
    """
    if is_compressed(name):
        return load(name, device=device), load_tokenizer(name)
    loaded = load_dense(name, device)
    return loaded.model, loaded.tokenizer


def calibration_seed(name: str) -> int | None:
    """The seed that a checkpoint was calibrated with; None for a dense model or a method without calibration."""
    if not is_compressed(name):
        return None
    protocol = read_record(Path(name)).get("calibration")
    seed = protocol.get("seed") if isinstance(protocol, dict) else None
    return seed if isinstance(seed, int) else None
