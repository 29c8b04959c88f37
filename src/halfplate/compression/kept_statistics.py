"""Sums and statistics that tasks pass to each other in artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from halfplate.calibration.collect import StageSums, Sums
from halfplate.errors import HalfplateError
from halfplate.statistics import InputStatistics
from halfplate.storage.artifact import Artifact, load_artifact, save_artifact
from halfplate.storage.tensor_file import read_tensor


def save_sums(path: Path, sums: StageSums) -> None:
    """Write sums to an artifact."""
    tensors: dict[str, Tensor] = {}
    for leader, found in sums.sums.items():
        if found.squares is not None:
            tensors[f"{leader}:squares"] = found.squares
        for key, tensor in (("products", found.products), ("crosses", found.crosses)):
            if tensor is not None:
                tensors[f"{leader}:{key}"] = tensor
    tokens = {leader: found.tokens for leader, found in sums.sums.items()}
    save_artifact(path, tensors, {"leaders": sums.leaders, "tokens": tokens}, durable=False)


def load_sums(path: Path) -> StageSums:
    """Read the sums that `save_sums` wrote."""
    artifact = _whole(path)

    def tensor(name: str) -> Tensor | None:
        return read_tensor(artifact.tensors[name]) if name in artifact.tensors else None

    sums = {
        leader: Sums(tokens, *(tensor(f"{leader}:{key}") for key in ("squares", "products", "crosses")))
        for leader, tokens in artifact.facts["tokens"].items()
    }
    return StageSums(dict(artifact.facts["leaders"]), sums)


def save_statistics(path: Path, statistics: Mapping[str, InputStatistics]) -> None:
    """Write the statistics of some inputs to an artifact, by the names of their leaders."""
    tensors = {
        f"{leader}:{key}": tensor
        for leader, found in statistics.items()
        for key, tensor in (("diagonal", found.diagonal), ("gram", found.gram), ("cross", found.cross))
        if tensor is not None
    }
    tokens = {leader: found.tokens for leader, found in statistics.items()}
    save_artifact(path, tensors, {"tokens": tokens}, durable=False)


def load_statistics(path: Path, leader: str, device: str) -> InputStatistics:
    """Read the statistics of one input."""
    artifact = _whole(path)
    found = {
        key: read_tensor(artifact.tensors[name]).to(device)
        for key in ("diagonal", "gram", "cross")
        if (name := f"{leader}:{key}") in artifact.tensors
    }
    return InputStatistics(artifact.facts["tokens"][leader], **found)


def _whole(path: Path) -> Artifact:
    artifact = load_artifact(path)
    if artifact is None:
        raise HalfplateError(
            f"the file {str(path)!r} is damaged or cannot be read by this machine; put OUT on storage that all machines share, and use --resume"
        )
    return artifact
