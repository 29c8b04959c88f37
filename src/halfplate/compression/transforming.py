"""Running the transforms of a plan piece by piece. Each piece is made once and kept in the work folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from torch import Tensor

from halfplate.calibration import CalibrationTokens
from halfplate.compression.measuring import measured
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.reading import in_words
from halfplate.models.sources import Source, skeleton
from halfplate.models.streamed import StreamedModel
from halfplate.planning.transforming import TransformPlan
from halfplate.recipe import Recipe
from halfplate.storage.artifact import Artifact, load_artifact, save_artifact_of
from halfplate.storage.tensor_file import StoredTensor
from halfplate.telemetry.progress import Report
from halfplate.transforms import MeasuredTransform, Piece, Settled, chosen, outline, pieces_of

# The calibration text of a model whose tensors can be read one by one.
Tokens = Callable[[StreamedModel], CalibrationTokens]


def transformed(
    source: Source,
    steps: Sequence[TransformPlan],
    recipe: Recipe,
    work: WorkFolder,
    report: Report,
    tokens_of: Tokens | None = None,
) -> tuple[Source, Source]:
    """The original and the transformed model; the tensors of both can be read one by one.

    steps: the transforms of the plan of `recipe`. tokens_of: called with the original model if a transform is measured on text.
    """
    original, tokens = source, None
    for number, step in enumerate(steps):
        making = _Transforming(source, step, recipe, work, number)
        if isinstance(making.transform, MeasuredTransform) and tokens is None:
            assert tokens_of is not None
            tokens = tokens_of(StreamedModel(original, recipe.device, recipe.precision))
        source = making.run(report, tokens)
        if step.automatic:
            original = source
    return original, source


class _Transforming:
    """One transform of one model."""

    def __init__(self, source: Source, step: TransformPlan, recipe: Recipe, work: WorkFolder, number: int) -> None:
        self.source, self.label, self.automatic = source, step.label, step.automatic
        self.recipe, self.work, self.number = recipe, work, number
        self.transform = chosen(step.label, None if step.automatic else recipe.keep)

    def run(self, report: Report, tokens: CalibrationTokens | None) -> Source:
        """Make the missing pieces, and return the result. tokens: not None if the transform is measured."""
        settle = self._settling(report, tokens)
        result = outline(self.transform, self.source)
        if isinstance(self.transform, MeasuredTransform):
            with self._foreign():
                result = replace(result, config=settle().config)
        pieces = self._pieces(result)
        found: dict[str, StoredTensor] = {}
        total = sum(len(piece.entries) for piece in pieces)
        report("transforming", 0, total, self.label)
        for index, piece in enumerate(pieces):
            path = self.work.transformed(self.number, index)
            artifact = load_artifact(path)
            if artifact is None or not _whole(artifact, piece):
                save_artifact_of(path, piece.entries, self._checked(settle, piece), {})
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

    def _settling(self, report: Report, tokens: CalibrationTokens | None) -> Callable[[], Settled]:
        """A function that decides what the result is, once; finished pieces need no decision unless the transform is measured."""

        @cache
        def settle() -> Settled:
            transform, source = self.transform, self.source
            if not isinstance(transform, MeasuredTransform):
                return Settled(transform.configuration(source), transform.open(source))
            assert tokens is not None
            streamed = StreamedModel(source, self.recipe.device, self.recipe.precision)
            statistics = measured(transform, streamed, tokens, self.work, self.number, report)
            return transform.settled(source, statistics)

        return settle

    def _checked(self, settle: Callable[[], Settled], piece: Piece) -> Iterator[tuple[str, Tensor]]:
        """Pass on the tensors of a piece while they are written; raises HalfplateError unless they match its entries."""
        left = dict(piece.entries)
        for name, tensor in self._made(settle, piece):
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

    def _made(self, settle: Callable[[], Settled], piece: Piece) -> Iterator[tuple[str, Tensor]]:
        with self._foreign():
            yield from settle().make(piece)

    @contextmanager
    def _foreign(self) -> Iterator[None]:
        """Context manager around the code of a transform, which may be that of another package."""
        try:
            yield
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
