"""Which class of transformers builds a configuration, and where the language model of a multimodal model is."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CAUSAL = "AutoModelForCausalLM"
IMAGE_TEXT = "AutoModelForImageTextToText"
MULTIMODAL = "AutoModelForMultimodalLM"


def auto_name(config: PretrainedConfig) -> str | None:
    """The name of the auto class that builds and loads the model of `config` with all its parts; None if there is none.

    A configuration whose type has both a text model and a multimodal one is the one that its `architectures` name, by default the latter.
    """
    import transformers

    found = {name: _class_of(getattr(transformers, name), config) for name in (IMAGE_TEXT, MULTIMODAL, CAUSAL)}
    stated = [str(one) for one in getattr(config, "architectures", None) or ()]
    named = (name for name, made in found.items() if made is not None and made.__name__ in stated)
    known = (name for name, made in found.items() if made is not None)
    return next(named, None) or next(known, None)


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class of transformers for `config`: AutoModelForCausalLM for a text model."""
    import transformers

    return getattr(transformers, auto_name(config) or CAUSAL)


def model_class(config: PretrainedConfig) -> Any:
    """The class of the model that `auto_class` builds; None if transformers knows none."""
    return _class_of(auto_class(config), config)


def is_wrapper(config: Any) -> bool:
    """Whether the language model is a part of the model of `config`, beside vision or audio towers."""
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The part that runs text, with its name: `("", model)` for a text model, `("model.language_model", ...)` for most wrappers."""
    config = getattr(model, "config", None)
    if is_wrapper(config):
        text: Any = config.get_text_config()  # type: ignore[union-attr]
        for name, module in model.named_modules():
            if name and getattr(module, "config", None) is text:
                return name, module
    return "", model


def needed_inputs(model: nn.Module) -> list[str]:
    """Arguments without which `model` does not run, besides the tokens: those of images or audio."""
    taken = inspect.signature(model.forward).parameters.values()
    named = (one for one in taken if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL))
    return [one.name for one in named if one.default is one.empty and one.name != "input_ids"]


def _class_of(auto: Any, config: PretrainedConfig) -> Any:
    found = auto._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple | list) else found
