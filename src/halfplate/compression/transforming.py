"""Running the transforms of a plan piece by piece. Each piece is made once and kept in the work folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.reading import in_words
from halfplate.models.sources import Source, skeleton
from halfplate.models.streamed import StreamedModel
from halfplate.planning import Plan
from halfplate.storage.artifact import Artifact, load_artifact, save_artifact_of
from halfplate.storage.tensor_file import StoredTensor
from halfplate.telemetry.progress import Report
from halfplate.transforms import Maker, Piece, find, outline, pieces_of


def transformed(source: Source, plan: Plan, work: WorkFolder, report: Report) -> tuple[Source, Source]:
    """The original and the transformed model; the tensors of both can be read one by one."""
    original = source
    for number, step in enumerate(plan.transforms):
        source = _Transforming(source, step.label, step.automatic, work, number).run(report)
        if step.automatic:
            original = source
    return original, source


class _Transforming:
    """One transform of one model."""

    def __init__(self, source: Source, label: str, automatic: bool, work: WorkFolder, number: int) -> None:
        self.source, self.label, self.automatic = source, label, automatic
        self.work, self.number = work, number
        self.transform = find(label)

    def run(self, report: Report) -> Source:
        """Make the missing pieces, and return the result."""
        result = outline(self.transform, self.source)
        pieces = self._pieces(result)
        found: dict[str, StoredTensor] = {}
        total = sum(len(piece.entries) for piece in pieces)
        report("transforming", 0, total, self.label)
        for index, piece in enumerate(pieces):
            path = self.work.transformed(self.number, index)
            artifact = load_artifact(path)
            if artifact is None or not _whole(artifact, piece):
                save_artifact_of(path, piece.entries, self._checked(piece), {})
                artifact = load_artifact(path)
            assert artifact is not None
            found |= artifact.tensors
            report("transforming", len(found), total, self.label)
        return replace(result, tensors=found)

    def _pieces(self, result: Source) -> list[Piece]:
        pieces = pieces_of(skeleton(result))
        if self.automatic:
            return pieces
        streamed = StreamedModel(self.source)
        # Tensors that transformers does not need and the source lacks are not required.
        lacking = streamed.model.state_dict().keys() - streamed.stored.keys() - streamed.tied.keys()
        return [_without(piece, lacking) for piece in pieces]

    @cached_property
    def _make(self) -> Maker:
        return self.transform.open(self.source)

    def _checked(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        """Pass on the tensors of a piece while they are written; raises HalfplateError unless they match its entries."""
        left = dict(piece.entries)
        for name, tensor in self._made(piece):
            dtype, shape = left.pop(name, (None, ()))
            if dtype is None:
                raise HalfplateError(
                    f"{self._where} returned the tensor {name}, which is unexpected or a duplicate; {self._cure}"
                )
            if tuple(tensor.shape) != shape:
                raise HalfplateError(
                    f"{self._where}: {name} has shape {tuple(tensor.shape)}, expected {shape} from its configuration; {self._cure}"
                )
            yield name, tensor.to(dtype)
            del tensor
        if left:
            raise HalfplateError(
                f"{self._where} lacks {len(left)} tensors of its configuration ({min(left)}, ...), which would be random; {self._cure}"
            )

    def _made(self, piece: Piece) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from self._make(piece)
        except (HalfplateError, OSError):
            raise
        # The code of another package can raise any exception.
        except Exception as error:
            raise HalfplateError(f"{self._where} cannot be made ({in_words(error)}); {self._cure}") from error

    @property
    def _where(self) -> str:
        what = "its files" if self.automatic else f"the result of the transform {self.label}"
        return f"model={self.source.name!r}: {what}"

    @property
    def _cure(self) -> str:
        return (
            "download the model again"
            if self.automatic
            else "leave the transform out, or update the package that it comes from"
        )


def _whole(artifact: Artifact, piece: Piece) -> bool:
    return artifact.tensors.keys() == piece.entries.keys() and artifact.damaged() is None


def _without(piece: Piece, names: Collection[str]) -> Piece:
    return replace(piece, entries={name: entry for name, entry in piece.entries.items() if name not in names})
