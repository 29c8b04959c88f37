"""`save_pretrained` of a loaded model: a whole checkpoint again, with its record, its card and its sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.checkpoint.weights import read_headers, read_tensors, sha256
from halfplate.checkpoint.write import add_sentence, write_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What write_record adds, and what belongs to the weights as they were.
WRITTEN = ("format_version", "versions", "tensors")


class SavePretrained:
    """`save_pretrained` of one model, which its class cannot have: transformers hands no quantizer the folder.

    Set as an attribute of the model, which it holds, so that `load(OUT).save_pretrained(...)` works; such a circle is freed by
    the garbage collector. Copies and pickles refer to the copy.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with `halfplate.json` and the model card beside the weights."""
        model: Any = self._model
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        add_sentence(folder)
        found = read_headers(folder)
        record: Mapping[str, Any] = model.hf_quantizer.record
        kept = {key: value for key, value in record.items() if key not in WRITTEN}
        write_record(folder, kept | {"tensors": {name: sha256(tensor) for name, tensor in read_tensors(found)}})
        if push_to_hub:
            _upload(folder, token=kwargs.get("token"), **hub)

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self._model,)


def _upload(
    folder: Path,
    token: Any,
    repo_id: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=folder, **options)
