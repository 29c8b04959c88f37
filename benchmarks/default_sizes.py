"""The share of the decoder weights that is compressed, at the sizes that a configuration of transformers has by default.

Tiny models have relatively large gates, convolutions and norms; these shares are near those of real models.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

from halfplate.models.conv1d import as_linears
from halfplate.models.experts import linear_experts
from halfplate.models.linears import find_blocks, find_linears
from tiny_models import DROPPED, few_layers


def default_config(made: Any) -> Any:
    """A configuration of the class `made` with its default sizes, and with as many layers as the tiny model."""
    entries = few_layers(made().to_dict())
    for key, part in getattr(made, "sub_configs", {}).items():
        if isinstance(entries.get(key), dict):
            kind = entries[key].get("model_type")
            # `get` of this mapping finds nothing that is not loaded yet.
            inner = default_config(CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else part).to_dict()  # noqa: SIM401
            named = {} if kind is None else {"model_type": kind}
            entries[key] = {name: value for name, value in inner.items() if name not in DROPPED} | named
    return made(**entries)


def default_share(kind: str, wrapper: bool) -> float:
    """Parameters of the matrices to compress over all those of the decoder layers of a model of type `kind` that run on a text.

    Raises what transformers does.

    A multimodal model whose parts do not fit each other by default has the share of its language model.
    """
    try:
        return _share(kind, wrapper)
    except Exception:  # transformers raises its own for each class
        inner = CONFIG_MAPPING[kind]().get_text_config().model_type
        if not wrapper or inner == kind:
            raise
        return _share(inner, False)


def _share(kind: str, wrapper: bool) -> float:
    auto: Any = AutoModelForMultimodalLM if wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(default_config(CONFIG_MAPPING[kind]), dtype=torch.float32).eval()
    as_linears(model)
    linear_experts(model)
    found, skipped = find_linears(model)
    whole = sum(parameter.numel() for parameter in find_blocks(model)[1].parameters())
    idle = [module.name for module in skipped if "does not run on a text" in module.reason]
    whole -= sum(parameter.numel() for name in idle for parameter in model.get_submodule(name).parameters())
    return sum(linear.d_out * linear.d_in for linear in found) / whole
