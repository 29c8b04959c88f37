"""Building a compressed model in transformers, through its quantizer interface (`from_pretrained`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from halfplate.checkpoint.config import METHOD, RECORD_FILE, SENTENCE, read_record
from halfplate.checkpoint.quantization import HalfplateConfig
from halfplate.checkpoint.weights import check_layout, headers_of
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedMatrix, WeightSpec, check_stored, connect, dense_module, stand_in
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.integrations.ties import note_untied, tie_again, untie
from halfplate.models.experts import experts_of, joined_experts, linear_experts
from halfplate.storage.tensor_file import StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


OLDEST_TRANSFORMERS = (5, 19)


class HalfplateQuantizer(HfQuantizer):
    """Puts a `CompressedMatrix` wherever the checkpoint holds compressed tensors, and checks what was loaded.

    An original model with a recipe is loaded first and then compressed.

    record: the content of `halfplate.json`, if there is one; `save_pretrained` writes it again.
    """

    quantization_config: HalfplateConfig
    record: Mapping[str, Any]

    def __init__(self, quantization_config: HalfplateConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.record = {}
        self._read: dict[str, str] = {}  # matrices of codes whose type the model's code reads, with the reason
        self.conv1d: tuple[str, ...] = ()  # linears in the place of GPT-2's Conv1D
        self._source: Path | None = None  # folder of the original model to compress
        if self.pre_quantized and quantization_config.recipe is not None:
            raise HalfplateError(
                "recipe: the checkpoint is compressed already; leave quantization_config out, or give the original model"
            )
        if not self.pre_quantized and quantization_config.recipe is None:
            raise HalfplateError(
                "quantization_config has no recipe for compressing the original model; pass HalfplateConfig(recipe=Recipe(...))"
            )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        if installed < OLDEST_TRANSFORMERS:
            raise HalfplateError(
                f"transformers={transformers.__version__} is too old, expected at least 5.19; run `pip install -U transformers`"
            )

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Remove the entry that stops other programs from loading; transformers calls this method before it looks for weights."""
        if getattr(config, "transformers_weights", None) == SENTENCE:
            config = copy.copy(config)
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if not self.pre_quantized:
            if model.get_output_embeddings() is None:
                raise HalfplateError(
                    f"recipe: {type(model).__name__} is not a language model; load it with AutoModelForCausalLM"
                )
            self._source = folder
            return model
        if folder is not None and (folder / RECORD_FILE).is_file():
            self.record = read_record(folder)
        # transformers imports this module during its own import, too early for the models.
        from halfplate.models.conv1d import as_linears

        self.conv1d = as_linears(model)
        specs = self.quantization_config.specs
        if self.quantization_config.linear_experts:
            linear_experts(model)
            for name in experts_of(model):
                # Some code of transformers would initialise the tensors of all experts from the module above.
                vars(_module(model, name.rpartition(".")[0]))["_is_hf_initialized"] = True
        found = headers_of(map(Path, checkpoint_files)) if checkpoint_files else None
        if found is not None:
            check_layout(found, specs)
        modules = {name: stand_in(_module(model, name), spec, name) for name, spec in specs.items()}
        if found is not None:
            _check_room(model, found, specs)
        self._read = _read_codes(model, specs)
        for name, module in modules.items():
            bias = getattr(module, "bias", None)
            if found is not None and (bias is None) == (f"{name}.bias" in found):
                state = "missing" if bias is not None else "stored, but the model does not have it"
                raise HalfplateError(
                    f"{name}.bias is {state}; the checkpoint does not fit its config.json, write it again"
                )
            model.set_submodule(name, module)
        connect(model)
        untie(model, specs)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        note_untied(model)
        if self.pre_quantized:
            _check_loaded(model)
        else:
            self._compress(model)
        for name, module in _compressed(model):
            for part, (shape, dtype) in module.spec.layout().items():
                tensor = getattr(module, part)
                if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                    raise HalfplateError(
                        f"{name}.{part} was loaded as {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}; report this"
                    )
        # transformers imports this module during its own import, too early for the runtime.
        from halfplate.checkpoint.saving import SavePretrained
        from halfplate.runtime.prepare import accelerate

        runtime, found = self.quantization_config.runtime, list(_compressed(model))
        in_memory = all(tensor.device.type == "cpu" for _, module in found for tensor in module.stored().values())
        if runtime is not None and in_memory:
            # Packing checks the values.
            accelerate(model, **dict(runtime))
        for name, module in _compressed(model):
            check_stored(module.spec, module.stored(), name)  # except tensors offloaded to disk
            if name in self._read:
                raise HalfplateError(
                    f"{name} is stored as {module.spec.core_dtype}, and {self._read[name]}: its results would be wrong without kernels; "
                    "load it with them, or compress the model again"
                )
        model.save_pretrained = SavePretrained(model)  # type: ignore[method-assign]
        return model

    def _compress(self, model: PreTrainedModel) -> None:
        """Compress the original `model` in place, through a checkpoint in a temporary folder."""
        # Imported here because it imports this module, and more than loading a checkpoint needs.
        from halfplate.integrations.on_load import compress_in_place
        from halfplate.models.conv1d import as_linears

        self.conv1d = as_linears(model)
        specs, self.record = compress_in_place(model, self._source, self.quantization_config.recipe)
        made = HalfplateConfig.from_specs(specs, bool(experts_of(model)))
        self.quantization_config.modules, self.quantization_config.needs = made.modules, made.needs
        self.quantization_config.recipe = None
        self.pre_quantized = True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace every compressed module by an nn.Linear, multiplied out in fp32, and cast all parameters to `dtype`."""
        from halfplate.models.conv1d import as_conv1d
        from halfplate.runtime.prepare import restore

        restore(model)
        model.__dict__.pop("save_pretrained", None)
        if isinstance(dtype, str):  # arguments that transformers passes after the model has been saved
            dtype = getattr(torch, dtype)
        compressed = dict(_compressed(model))
        for name, module in compressed.items():
            if module.spec.same_as is None:
                model.set_submodule(name, dense_module(module, dtype or module.dtype))
        tie_again(model, {name: module.spec.same_as for name, module in compressed.items() if module.spec.same_as})
        joined_experts(model)
        as_conv1d(model, self.conv1d)
        # What was dense before has the type it was loaded in, a merged adapter fp32; products need one type. Buffers keep theirs.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through compressed modules to their inputs; after `runtime.restore`, also to values and wrappers."""
        return True


def _read_codes(model: PreTrainedModel, specs: Mapping[str, WeightSpec]) -> dict[str, str]:
    """The matrices of integer codes whose type the model's code uses as a computing type, with the reason."""
    codes = {name for name, spec in specs.items() if spec.core_dtype in QUANTIZERS}
    if not codes:
        return {}
    # transformers imports this module during its own import.
    from halfplate.models.data_reads import data_reads
    from halfplate.models.linears import find_blocks

    reads, failure = data_reads(model, find_blocks(model)[0])
    return {} if failure else {name: reason.partition(";")[0] for name, reason in reads.items() if name in codes}


def _check_room(model: PreTrainedModel, found: Mapping[str, StoredTensor], specs: Mapping[str, WeightSpec]) -> None:
    """Raise HalfplateError if the uncompressed parameters of the still empty model are larger than the stored ones."""
    # A tied tensor is stored once, but is not tied yet.
    replaced = {f"{name}.weight" for name in specs} | set(model.all_tied_weights_keys)
    needed = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in replaced)
    stored = sum(prod(tensor.shape) for tensor in found.values())
    if needed > stored:
        raise HalfplateError(
            f"config.json describes {needed} parameters outside the compressed matrices, but the files hold {stored} values; copy or write the checkpoint again"
        )


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise HalfplateError(
            f"quantization_config.modules names {name!r}, which {type(model).__name__} does not have; load the checkpoint with AutoModelForCausalLM"
        ) from None


def _compressed(model: nn.Module) -> Iterator[tuple[str, CompressedMatrix]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, CompressedMatrix))


def _check_loaded(model: PreTrainedModel) -> None:
    for name, tensor in _stored_tensors(model):
        if not getattr(tensor, "_is_hf_initialized", False):
            architectures, kind = model.config.architectures or (), type(model).__name__
            cure = (
                f"it holds a {architectures[0]} and not a {kind}, load it with AutoModelForCausalLM"
                if architectures and kind not in architectures
                else "copy or write it again"
            )
            raise HalfplateError(f"{name} was not loaded; the checkpoint lacks it: {cure}")


def _stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model that its files should hold; tensors offloaded to disk are on the meta device."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_meta and name not in model.all_tied_weights_keys:
            yield name, tensor


if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(METHOD)(HalfplateConfig)
    auto.register_quantizer(METHOD)(HalfplateQuantizer)
