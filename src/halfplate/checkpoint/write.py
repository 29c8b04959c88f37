"""Writing a compressed model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfplate.checkpoint.card import write_card
from halfplate.checkpoint.companions import copy_companions
from halfplate.checkpoint.config import CONFIG_FILE, RECORD_FILE, RECORD_VERSION, SENTENCE, read_record
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.quantization import HalfplateConfig
from halfplate.checkpoint.stack import stack_order
from halfplate.checkpoint.weights import read_headers, write_tensors
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedMatrix, WeightSpec, check_shared
from halfplate.json_numbers import finite
from halfplate.models.experts import experts_of
from halfplate.models.fit import further_tensors
from halfplate.models.linears import ties_layers
from halfplate.storage.shards import MAX_SHARD_NBYTES
from halfplate.storage.tensor_file import read_tensors
from halfplate.version import versions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    specs: dict[str, WeightSpec],
    record: dict[str, Any],
    other_dtype: torch.dtype,
    overwrite: bool = False,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    partial: Path | None = None,
    beside: Path | None = None,
) -> None:
    """Write `model`, with a compressed module under each name in `specs`, to the folder `out`, whole or not at all.

    specs: none for an ordinary model, which needs no Halfplate.
    record: content of `halfplate.json`; versions and the checksum of each tensor are added.
    other_dtype: element type of all floating-point tensors outside compressed matrices; the model is rounded to it in place
        (`round_others`), so that it computes the same as the checkpoint.
    partial: as in `new_folder`.
    beside: as in `write_model`.
    Raises HalfplateError if `out` cannot be written, and if `model` does not match `specs`.
    """
    _check_modules(model, specs)
    check_shared(specs)
    with new_folder(Path(out), overwrite, partial) as folder:
        round_others(model, other_dtype)
        quantization = HalfplateConfig.from_specs(specs, bool(experts_of(model))) if specs else None
        checksums = write_model(model, tokenizer, folder, other_dtype, quantization, max_shard_nbytes, beside)
        write_record(folder, record | {"tensors": checksums})


def round_others(model: PreTrainedModel, other_dtype: torch.dtype) -> None:
    """Round all floating-point tensors outside compressed matrices to `other_dtype` in place, without changing their type."""
    stored = _matrix_dtypes(model)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in stored and tensor.is_floating_point():
                tensor.copy_(tensor.to(other_dtype))


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    other_dtype: torch.dtype,
    quantization: HalfplateConfig | None,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    beside: Path | None = None,
) -> dict[str, str]:
    """Write weights, configuration and tokenizer to an existing folder; returns the SHA-256 of each tensor.

    beside: folder of the model that was loaded; its processor files, and its tensors that predict further tokens, are copied.
    """
    tensors = _unshared(model)
    if beside is not None and beside.is_dir():
        stored = read_headers(beside)
        tensors |= dict(read_tensors({name: stored[name] for name in further_tensors(model, stored)}))
    matrices = _matrix_dtypes(model)
    dtypes = {
        name: matrices.get(name, other_dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    stack = stack_order({} if quantization is None else quantization.specs)
    checksums = write_tensors(tensors, dtypes, folder, max_shard_nbytes, stack)
    write_configuration(model, tokenizer, folder, other_dtype, quantization)
    if beside is not None:
        copy_companions(beside, folder)
    return checksums


def write_configuration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    other_dtype: torch.dtype,
    quantization: HalfplateConfig | None,
) -> None:
    """Write all of a checkpoint except its weights and its record; `model` may be a skeleton."""
    config = copy.deepcopy(model.config)
    config.dtype = other_dtype
    config.architectures = [type(model).__name__]
    if quantization is not None:
        config.quantization_config = quantization
        head = model.get_output_embeddings()
        heads = {name for name, module in model.named_modules() if module is head}
        borrows = any(quantization.specs[name].same_as is not None for name in heads & quantization.specs.keys())
        if borrows and not ties_layers(model):
            # Our own entry says what the head shares; transformers would tie tensors that are not there.
            config.tie_word_embeddings = False
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    if quantization is not None:
        add_sentence(folder)
    if model.generation_config is not None:
        # save_pretrained refuses settings that transformers reads with only a warning.
        model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def add_sentence(folder: Path) -> None:
    """Add the entry to `config.json` that stops transformers without Halfplate from loading, because saving removes it."""
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": SENTENCE}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def amend_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add later measurements to the record and the card of the checkpoint `folder`; NaN and inf become null."""
    write_record(folder, read_record(folder) | finite(facts))


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `halfplate.json`, which marks a folder as written by Halfplate, and the model card of the folder."""
    versions = versions_of(("safetensors", "torch", "transformers"))
    content = {"format_version": RECORD_VERSION, "versions": versions} | dict(record)
    (folder / RECORD_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_card(folder, content)


def _check_modules(model: PreTrainedModel, specs: Mapping[str, WeightSpec]) -> None:
    found = {name: module for name, module in model.named_modules() if isinstance(module, CompressedMatrix)}
    if found.keys() != specs.keys():
        name = min(found.keys() ^ specs.keys())
        state = "is compressed in the model" if name in found else "is not compressed in the model"
        raise HalfplateError(f"{name} {state}, specs say otherwise; give the specs of exactly the compressed modules")
    for name, module in found.items():
        if module.spec != specs[name]:
            raise HalfplateError(
                f"{name} is compressed as {module.spec}, specs say {specs[name]}; give the spec it was compressed with"
            )
        stored = module.stored()
        for part, (shape, dtype) in module.spec.layout().items():
            tensor = stored[part]
            if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                raise HalfplateError(
                    f"{name}.{part} is {tensor.dtype} {tuple(tensor.shape)}, its spec expects {dtype} {shape}; compress it again"
                )
        # A stranger's dense layer must refuse this tensor, or it would load nonsense without a word.
        assert "weight" not in stored or tuple(stored["weight"].shape) != (module.spec.d_out, module.spec.d_in), name


def _matrix_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Element type of every stored tensor of every compressed matrix, by its full name."""
    return {
        f"{name}.{part}": dtype
        for name, module in model.named_modules()
        if isinstance(module, CompressedMatrix)
        for part, (_, dtype) in module.spec.layout().items()
    }


def _unshared(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the model without those that transformers ties when it loads the model."""
    tensors: dict[str, Tensor] = model.state_dict()
    tied = model.all_tied_weights_keys.items()
    copies = {
        name for name, source in tied if source in tensors and tensors[name].data_ptr() == tensors[source].data_ptr()
    }
    return {name: tensor for name, tensor in tensors.items() if name not in copies}
