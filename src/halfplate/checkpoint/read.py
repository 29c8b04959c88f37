"""Loading and inspecting a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfplate.arguments import check_name, path_text
from halfplate.checkpoint.config import CONFIG_FILE, RECORD_FILE, read_json, read_record, read_specs
from halfplate.checkpoint.stack import prefix
from halfplate.checkpoint.weights import check_layout, read_headers
from halfplate.defaults import plain_defaults
from halfplate.device import check_device
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.formats import WeightSpec
from halfplate.formats.checks import check_tensor
from halfplate.models.auto import auto_class, model_class
from halfplate.models.fit import further_tensors
from halfplate.models.reading import reading
from halfplate.models.trust import check_counts, check_folder, check_layers
from halfplate.runtime.backends import without_kernel
from halfplate.storage.tensor_file import StoredTensor, read_tensors, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@plain_defaults()
def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    activations: str = "auto",
    head_dtype: str | None = None,
    kernels: bool = True,
    fit: int | str | None = None,
) -> PreTrainedModel:
    """Load the checkpoint in the folder `path` as a transformers model in eval mode, on the fastest path of this machine.

    - dtype: element type of activations and of uncompressed tensors; compressed tensors keep their stored type
    - activations, head_dtype: as in `halfplate.runtime.accelerate`; `halfplate.runtime.explain(model)` lists the kernels
    - kernels: False keeps the plain torch path, whose weights can be trained
    - fit: bytes of the weight files to read, or text such as `300MB`, of a checkpoint that holds steps of size (method bitstack); no
        more is read, and the end of the file may be missing

    Raises HalfplateError if the checkpoint is incomplete, invalid or too new. Every header, shape, type, position and code is
    checked, and values for NaN and inf. A flipped bit in a value is only found by `halfplate.inspect(path, verify=True)`.
    """
    folder = Path(path_text("path", path))
    check_device(device)
    specs, found = read_checked_headers(folder, whole=fit is None)
    if fit is not None:
        specs, found = prefix(str(path), specs, found, fit)
    if kernels and device == "cpu" and (slow := without_kernel(specs.values())) is not None:
        warnings.warn(f"{path}: {slow}", HalfplateWarning, stacklevel=3)  # past the decorator
    from transformers import AutoConfig

    from halfplate.runtime.prepare import accelerate, check_options

    runtime: dict[str, Any] | None = {"activations": activations, "head_dtype": head_dtype} if kernels else None
    check_options(activations, head_dtype)
    # A configuration is untrusted data, and each model class raises its own exceptions.
    with reading(
        str(path), "it cannot be loaded by transformers", "copy or write the checkpoint again", argument="path"
    ):
        check_layers(str(path), read_json(folder / CONFIG_FILE), "path")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        elements = sum(prod(tensor.shape) for tensor in found.values())
        check_counts(str(path), config, len(found), elements, "path")
        config.quantization_config |= {"runtime": runtime if device == "cpu" else None}
        if fit is None:
            build: Any = partial(auto_class(config).from_pretrained, folder, trust_remote_code=False)
        else:
            config.quantization_config["modules"] = {name: spec.to_json() for name, spec in specs.items()}
            build = partial(model_class(config).from_pretrained, None, state_dict=dict(read_tensors(found)))
        loaded: Any = build(
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report lists their names, the exception would not
        )
        if fit is not None:
            _add_companions(loaded[0], folder)
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found_wrong = set(map(str, report[problem]))
        if problem == "unexpected_keys":
            found_wrong -= set(further_tensors(model, found_wrong))
        if found_wrong:
            name = min(found_wrong)
            raise HalfplateError(
                f"path={str(path)!r} does not fit its config.json: {problem} {name}; copy or write the checkpoint again"
            )
    for name, tensor in _floats(model):
        # Minimum and maximum are NaN if any value is. This reads a large embedding only once.
        if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):
            raise HalfplateError(f"{name} holds NaN or inf, expected finite values; copy or write the checkpoint again")
    model.eval()
    if device != "cpu":
        model.to(torch.device(device))  # type: ignore[arg-type]
        if runtime is not None:
            accelerate(model, **runtime)
    return model


def _add_companions(model: Any, folder: Path) -> None:
    """Give a model that was built from tensors what transformers reads beside them: the settings of generation, and the record."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if (folder / RECORD_FILE).is_file():
        model.hf_quantizer.record = read_record(folder)


def _floats(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a model outside packed linears, which are checked when they are packed."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint in the folder `path`; raises HalfplateError if there is none."""
    from transformers import AutoTokenizer

    check_name("path", path)
    if not Path(path).is_dir():
        raise HalfplateError(f"path={str(path)!r} is not a folder; give the folder of a Halfplate checkpoint")
    cure = "put the tokenizer files of its original model there"
    with reading(str(path), "it has no tokenizer that can be read", cure, argument="path"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    return tokenizer


@plain_defaults()
def inspect_checkpoint(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """List every compressed matrix of a checkpoint with its bytes and error, and the totals; keys as in `halfplate inspect --json`.

    - verify: also read every tensor and compare it with its checksum

    Raises HalfplateError if the checkpoint is damaged.
    """
    folder = Path(path)
    specs, found = read_checked_headers(folder)
    record = read_record(folder) if verify or (folder / RECORD_FILE).is_file() else {}
    if verify:
        _verify(folder, specs, found, record)
    nbytes = sum(spec.nbytes for spec in specs.values())
    return {
        "matrices": [
            {
                "name": name,
                "format": spec.format,
                "pattern": str(spec.pattern),
                "core_dtype": spec.core_dtype,
                "shape": [spec.d_out, spec.d_in],
                "nbytes": spec.nbytes,
                "dense_nbytes": spec.dense_nbytes,
                "in_shared": spec.in_shared,
                "relative_error": _recorded(record, name, "relative_error"),
                "tokens": _recorded(record, name, "tokens"),
            }
            for name, spec in specs.items()
        ],
        "without_kernel": without_kernel(specs.values()),
        "tuned": bool(record.get("tuned_blocks")),
        "nbytes": nbytes,
        "dense_nbytes": sum(spec.dense_nbytes for spec in specs.values()),
        "other_nbytes": sum(tensor.nbytes for tensor in found.values()) - nbytes,
        "verified": verify,
    }


def read_checked_headers(folder: Path, whole: bool = True) -> tuple[dict[str, WeightSpec], dict[str, StoredTensor]]:
    """The specifications and the tensors of a checkpoint; raises HalfplateError unless they match.

    whole: False allows weight files whose end is missing.
    """
    specs = read_specs(folder)
    check_folder(str(folder), folder, "path")
    found = read_headers(folder, whole)
    check_layout(found, specs)
    return specs, found


def _recorded(record: dict[str, Any], name: str, key: str) -> Any:
    """An entry of the record of a matrix, or None."""
    matrices = record.get("matrices")
    matrix = matrices.get(name) if isinstance(matrices, dict) else None
    return matrix.get(key) if isinstance(matrix, dict) else None


def _verify(folder: Path, specs: dict[str, WeightSpec], found: dict[str, StoredTensor], record: dict[str, Any]) -> None:
    checksums = record.get("tensors")
    if not isinstance(checksums, dict):
        raise HalfplateError(f"{str(folder / RECORD_FILE)!r} has no checksums (`tensors`); write the checkpoint again")
    for name in sorted(checksums.keys() ^ found.keys()):
        state = "has no checksum" if name in found else "is missing"
        raise HalfplateError(f"{name} {state}; copy or write the checkpoint again")
    for name, tensor in read_tensors(found):
        if sha256(tensor) != checksums[name]:
            raise HalfplateError(
                f"{name} in {found[name].path.name} does not have the checksum in {RECORD_FILE}; copy or write the checkpoint again"
            )
        module, _, part = name.rpartition(".")
        if module in specs:
            check_tensor(specs[module], part, tensor, name)
