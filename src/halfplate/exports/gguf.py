"""Export to a GGUF file for llama.cpp: unpruned codes as they are in ggml's types, other matrices in F16, the rest in F32."""

import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from halfplate.checkpoint.config import RECORD_FILE
from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.exports.llama_logits import check_installed, compare_logits
from halfplate.models.gguf_comparison import Comparison, compare
from halfplate.models.gguf_tensors import FLOAT_TYPES, StoredTensor
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import is_compressed, load_dense
from halfplate.storage.atomic import whole_file

RECIPE = "gguf-q4"  # makes checkpoints that a file holds exactly


def export_gguf(
    source: str,
    out: Path,
    overwrite: bool,
    *,
    embedding_type: str | None = None,
    verify_logits: str | None = None,
) -> str:
    """Write a checkpoint or an original model of any source as one file (see `halfplate.exports.Exporter`).

    Unpruned matrices of codes without wrappers keep their codes and scales; the file is read back and compared value for value.

    embedding_type: type of an embedding and an output layer that are not compressed; one of `FLOAT_TYPES` in any case, F16 if None.
    verify_logits: text on which llama.cpp's logits are compared with those of the model; needs llama-cpp-python.
    Also raises HalfplateError for models that llama.cpp cannot compute.
    """
    if out.suffix != ".gguf":
        raise HalfplateError(f"out={str(out)!r} is not a .gguf file; name one, e.g. model.gguf")
    if out.exists() and not (overwrite and out.is_file()):
        raise HalfplateError(f"out={str(out)!r} exists; choose another name, or pass --overwrite to replace a file")
    if embedding_type is not None and str(embedding_type).upper() not in FLOAT_TYPES:
        known = ", ".join(kind.lower() for kind in FLOAT_TYPES)
        raise HalfplateError(f"embedding_type={embedding_type!r} is not one of {known}")
    if verify_logits is not None:
        check_installed(verify_logits)
    model, tokenizer = _model(source)
    try:
        with whole_file(out) as partial:
            tensors = write_gguf(model, tokenizer, partial, embedding_type=embedding_type and embedding_type.upper())
            compared = compare(partial, model.config, tensors)
            verified = (
                ""
                if verify_logits is None
                else f"; {compare_logits(partial, model, tensors, tokenizer, verify_logits)}"
            )
    except OSError as error:
        raise HalfplateError(
            f"out={str(out)!r} could not be written ({error.strerror or error}); check that the folder exists and the disk has free space"
        ) from error
    _warn_of_obstacles(tensors)
    return f"{out}: {source} for llama.cpp, {_described(tensors, compared)}{verified}"


def _model(source: str) -> tuple[Any, Any]:
    """The model, with its compressed matrices as they are stored, and its tokenizer."""
    if not is_compressed(source):
        loaded = load_dense(source)
        return loaded.model, loaded.tokenizer
    folder = Path(source)
    # The file has no checksums, so damage must be found here.
    inspect_checkpoint(folder, verify=(folder / RECORD_FILE).is_file())
    return load(folder, kernels=False), load_tokenizer(folder)


def _described(tensors: dict[str, StoredTensor], compared: Comparison) -> str:
    counts = Counter(stored.kind for stored in tensors.values())
    kinds = ", ".join(f"{count} tensors in {kind}" for kind, count in counts.most_common())
    same = compared.tensors - len(compared.rounded)
    rounded = (
        f", {len(compared.rounded)} are it rounded to {_kinds_of(tensors, compared.rounded)}"
        if compared.rounded
        else ""
    )
    return f"{kinds}; read back, {same} of {compared.tensors} equal the model value for value{rounded}"


def _kinds_of(tensors: dict[str, StoredTensor], keys: tuple[str, ...]) -> str:
    return " and ".join(sorted({tensors[key].kind for key in keys}))


def _warn_of_obstacles(tensors: dict[str, StoredTensor]) -> None:
    """Say, once for each reason, which compressed matrices lose their form."""
    names = defaultdict(list)
    for key, stored in tensors.items():
        if stored.obstacle is not None:
            names[stored.obstacle].append(key.removesuffix(".weight"))
    for obstacle, found in names.items():
        cure = (
            ""
            if "columns" in obstacle
            else f"; `halfplate compress MODEL -o OUT --recipe {RECIPE}` makes what it holds exactly"
        )
        warnings.warn(
            f"format='gguf': {len(found)} matrices ({found[0]}{', ...' if found[1:] else ''}) {obstacle}, and no type of GGUF holds that: they are "
            f"multiplied out and rounded to F16, at full size{cure}",
            HalfplateWarning,
            stacklevel=3,
        )
