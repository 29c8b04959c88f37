"""The `quantization_config` of a checkpoint: which modules are compressed, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from halfplate.checkpoint.config import METHOD, VERSION, parse_modules, quantization_config
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.formats.needs import LINEAR_EXPERTS

if TYPE_CHECKING:
    from halfplate.recipe import Recipe


class HalfplateConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, or of an original model that is to be compressed while it is loaded.

    - modules: `WeightSpec.to_json()` by module name
    - version: of this object
    - runtime: arguments of `halfplate.runtime.accelerate` for the loaded model, or None for the torch path
    - recipe: for an original model, instead of `modules`: a `Recipe`, a mapping of its fields, or a YAML file
    - needs: as in the file (docs/format.md)

    `recipe` and `runtime` are not written to disk. Raises HalfplateError if the entry of a module or the recipe is invalid.
    """

    def __init__(
        self,
        modules: Any = None,
        version: Any = None,
        runtime: Any = (),
        recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
        needs: Any = None,
        **_: Any,
    ) -> None:
        if recipe is None and modules is None and version is None:
            raise HalfplateError(
                "HalfplateConfig needs a recipe for an original model, HalfplateConfig(recipe=Recipe(...)); a checkpoint is loaded without a quantization_config"
            )
        if recipe is None:
            parse_modules(version, modules, needs)
        elif modules is not None:
            raise HalfplateError(
                "recipe and modules are both given; give the recipe for an original model, the modules for a checkpoint"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = VERSION if recipe is not None else version
        self.modules = {} if recipe is not None else modules
        self.runtime, self.needs = runtime, needs
        self.recipe = None if recipe is None else _parsed(recipe)

    def to_dict(self) -> dict[str, Any]:
        needs = {} if self.needs is None else {"needs": self.needs}
        return {"quant_method": self.quant_method, "version": self.version, "modules": self.modules} | needs

    @classmethod
    def from_specs(cls, specs: Mapping[str, WeightSpec], linear_experts: bool = False) -> HalfplateConfig:
        """The configuration of a model with the compressed modules `specs`, by module path. linear_experts: its experts are linears."""
        return cls(**quantization_config(specs, linear_experts))

    @property
    def linear_experts(self) -> bool:
        """Whether experts are stored as linears (halfplate.models.experts)."""
        return LINEAR_EXPERTS in (self.needs or {})

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """The specification of each compressed module, by its path; raises HalfplateError if `modules` is invalid."""
        return parse_modules(self.version, self.modules, self.needs)


def _parsed(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    # Imported here because loading a checkpoint does not need it.
    from halfplate.recipe import Recipe

    return Recipe.from_mapping(recipe) if isinstance(recipe, Mapping) else Recipe.of(recipe)
