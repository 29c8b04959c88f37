"""LoRA adapters of peft on a compressed model: the base is frozen, and the adapter is kept separately or merged into a copy of full size."""

from typing import Any

import torch
from torch import nn

from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear
from halfplate.runtime.backends import Packed

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear
except ImportError as missing:
    raise HalfplateError(
        "halfplate.adapters needs peft; run `pip install 'halfplate[peft]'`", docs="docs/ecosystem.md"
    ) from missing


class LoraCompressed(LoraLinear):  # type: ignore[misc]
    """peft's LoRA for a compressed linear: y = base(x) + scaling · x Aᵀ Bᵀ, where A (r, d_in) and B (d_out, r) are trained.

    peft creates it for every targeted module of a configuration that `adapted` has prepared. Source: LoRA, arXiv 2106.09685.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.fan_in_fan_out = False  # as for an nn.Linear in peft: the weight is (d_out, d_in)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Only plain LoRA is supported; peft asks here which variant to use."""
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise HalfplateError(
                f"{type(variant).__name__} of peft is not supported for compressed linears; leave the option out",
                docs="docs/ecosystem.md",
            )

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; called by peft. Raises HalfplateError if `config` trains weights that are packed for the kernels."""
        if isinstance(self.get_base_layer(), Packed):
            for name, frozen in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
                value = getattr(config, name)
                if value and value != frozen:
                    raise HalfplateError(
                        f"{name}={value!r} trains weights of the base, which are packed for the kernels; load it with kernels=False",
                        docs="docs/ecosystem.md",
                    )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        sizes: tuple[int, int] = (module.in_features, module.out_features)  # type: ignore[assignment]
        return sizes

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The compressed base, or with `merge` an nn.Linear in fp32 that holds base and adapters; called by peft.

        Raises HalfplateError with `safe_merge` if the sum holds NaN or infinity.
        """
        base = self.get_base_layer()
        assert isinstance(base, CompressedLinear | Packed)
        if not merge:
            return base
        weight, bias = base.dense()
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.lora_A:
                weight = weight + self.get_delta_weight(name).to(weight)
                if self.lora_bias[name]:
                    added = self.lora_B[name].bias.data * self.scaling[name]
                    bias = added.to(weight) + (0 if bias is None else bias)
        if safe_merge and not torch.isfinite(weight).all():
            raise HalfplateError(f"adapter_names={adapter_names} give weights that are not finite; train them again")
        d_out, d_in = weight.shape
        merged = nn.Linear(d_in, d_out, bias is not None, device="meta")
        merged.load_state_dict({"weight": weight.detach()} | ({} if bias is None else {"bias": bias}), assign=True)
        return merged.requires_grad_(False)

    def merge(self, *_: Any, **__: Any) -> None:
        """Always raises HalfplateError, because a compressed matrix cannot hold the sum."""
        raise HalfplateError("merge_adapter() needs full-size weights; call merge_and_unload() instead")


def adapted(config: LoraConfig) -> LoraConfig:
    """Prepare `config` for compressed linears, packed or not, and return it; use it with get_peft_model and from_pretrained.

    Raises HalfplateError for variants that read the original weight: DoRA, and initial values other than peft's default.
    """
    if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        raise HalfplateError(
            f"use_dora={config.use_dora}, init_lora_weights={config.init_lora_weights!r} need full weights; leave them at their defaults"
        )
    config._register_custom_module({CompressedLinear: LoraCompressed, Packed: LoraCompressed})
    return config
