"""`save_pretrained` of a loaded model: writes a complete checkpoint with its record and model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.checkpoint.weights import read_headers
from halfplate.checkpoint.write import add_sentence, write_record
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedMatrix
from halfplate.runtime.backends import Packed
from halfplate.storage.shards import INDEX, SINGLE
from halfplate.storage.tensor_file import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Entries that write_record adds again, or that describe the weights before saving.
WRITTEN = ("format_version", "versions", "tensors")


class SavePretrained:
    """The `save_pretrained` of one model. It replaces that of the class, because transformers does not pass the folder to quantizers.

    It is set as an attribute of the model, so that `load(OUT).save_pretrained(...)` works. The reference cycle is freed by the
    garbage collector. Copies and pickles refer to the copied model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, and also writes `halfplate.json` and the model card.

        Raises HalfplateError, without writing anything, if `variant` is given, if the path is a file, or if a matrix is no
        longer compressed.
        """
        model: Any = self._model
        folder = Path(save_directory)
        _check_savable(model, folder, kwargs.get("variant"))
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        type(model).save_pretrained(model, folder, is_main_process, state_dict, False, *args, **kwargs)
        if not is_main_process:
            return
        _drop_stale(folder)
        add_sentence(folder)
        found = read_headers(folder)
        record: Mapping[str, Any] = model.hf_quantizer.record
        kept = {key: value for key, value in record.items() if key not in WRITTEN}
        write_record(folder, kept | {"tensors": {name: sha256_of(tensor) for name, tensor in found.items()}})
        if push_to_hub:
            _upload(folder, token=kwargs.get("token"), **hub)

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self._model,)


def _check_savable(model: Any, folder: Path, variant: str | None) -> None:
    if variant is not None:
        raise HalfplateError(f"variant={variant!r} is not supported; leave it out and choose another folder")
    if folder.exists() and not folder.is_dir():
        raise HalfplateError(f"save_directory={str(folder)!r} is a file; choose a folder")
    for name in model.hf_quantizer.quantization_config.modules:
        module = model.get_submodule(name)
        if not isinstance(module, CompressedMatrix) and not (isinstance(module, Packed) and module.dense_dtype is None):
            raise HalfplateError(
                f"{name} is a {type(module).__name__}, no longer a compressed matrix; call model.dequantize() and save the full-size model, "
                "or remove adapters with unload()"
            )


def _drop_stale(folder: Path) -> None:
    """Remove weights that an earlier single file or index left here, because transformers would read the single file."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        min((single, index), key=lambda file: file.stat().st_mtime_ns).unlink()


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
