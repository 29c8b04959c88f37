"""Compression of an original model while transformers loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfplate.checkpoint.config import read_record, read_specs
from halfplate.checkpoint.weights import read_headers
from halfplate.compression.compress import compress
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec, connect, stand_in
from halfplate.integrations.ties import untie
from halfplate.models.experts import linear_experts
from halfplate.models.linears import replace_module, ties_layers
from halfplate.recipe import Recipe
from halfplate.storage.tensor_file import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@plain_defaults()
@torch.no_grad()
def compress_in_place(
    model: PreTrainedModel, source: Path | None, recipe: Recipe | None
) -> tuple[dict[str, WeightSpec], dict[str, Any]]:
    """Compress the original model in the folder `source` and put the result into `model`, which was loaded from there.

    The result equals that of `compress`; other tensors keep the element type in which `model` was loaded. Returns the specifications
    of the compressed modules and the record of the compression. Raises HalfplateError if `compress` does, and if parts of the model are
    not in memory.
    """
    absent = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if source is None or absent is not None:
        what = "the model has no weight files" if source is None else f"{absent} is not in memory"
        raise HalfplateError(
            f"recipe: {what}, so nothing can be compressed while it is loaded; run `halfplate compress` and load its result"
        )
    if recipe is not None and recipe.keep is not None:
        raise HalfplateError(
            f"recipe: keep={recipe.keep:g} makes the model smaller than the one that is being loaded; run `halfplate compress` and load its result"
        )
    with TemporaryDirectory(prefix="halfplate-") as scratch:
        out = Path(scratch) / "checkpoint"
        compress(str(_with_tokenizer(source, model)), out, recipe or Recipe.of(), check=False)
        specs, record = read_specs(out), read_record(out)
        # Before the tensors are compared, because those of experts have other names.
        linear_experts(model)
        tensors = dict(read_tensors(read_headers(out)))
    _check_shapes(model, specs, tensors)
    head = model.get_output_embeddings()
    for name, spec in specs.items():
        replaced: Any = model.get_submodule(name)
        module, bias = stand_in(replaced, spec, name), getattr(replaced, "bias", None)
        stored = {part: tensors.pop(f"{name}.{part}").to(replaced.weight.device) for part in spec.layout()}
        module.load_state_dict(stored | ({} if bias is None else {"bias": bias.detach()}), assign=True)
        replace_module(model, name, module.requires_grad_(False))
        if replaced is head and spec.same_as is not None and not ties_layers(model):
            model.config.tie_word_embeddings = False
    connect(model)
    untie(model, specs)
    # Tuning and transforms may also have changed uncompressed tensors.
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    return specs, record | {"model": model.config.name_or_path}


def _check_shapes(model: PreTrainedModel, specs: Mapping[str, WeightSpec], tensors: Mapping[str, Tensor]) -> None:
    """Raise HalfplateError if a transform has made tensors that the loaded model does not have."""
    state = model.state_dict(keep_vars=True)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (spec.d_out, spec.d_in) for name, spec in specs.items()}
    inside = tuple(f"{name}." for name in specs)
    shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith(inside)}
    for name, shape in shapes.items():
        if name not in state or tuple(state[name].shape) != shape:
            raise HalfplateError(
                f"recipe: its transforms make {name} of shape {shape}, which the model that is being loaded does not have; "
                "run `halfplate compress` and load its result"
            )


def _with_tokenizer(source: Path, model: PreTrainedModel) -> Path:
    """`source`, after the tokenizer files of a Hub model have been downloaded."""
    revision = getattr(model.config, "_commit_hash", None)
    if revision is not None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(model.config.name_or_path, revision=revision)
    return source
