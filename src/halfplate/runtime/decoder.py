"""Reading prompts and decoding in native calls, also inside transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from halfplate.kernels import native
from halfplate.models.arguments import cache_argument
from halfplate.runtime.architectures import ARCHITECTURES, Architecture, architecture_of, config_of
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.calls import DTYPES, NewTokens, cache_of, new_tokens, wants_growing_cache
from halfplate.runtime.native_step import NativeDecoder
from halfplate.runtime.traits import linears_of, traits_of


def install(model: Any) -> str:
    """Let `model` decode natively, one token of each sequence at a time; returns `native`, or the reason why it cannot.

    The class of the model becomes a subclass; all other calls run as before.
    """
    reason = why_not(model)
    if reason is None and not isinstance(model, NativeDecoding):
        model.__class__ = _native_class(type(model))  # type: ignore[arg-type]
    return reason or "native"


def uninstall(model: Any) -> None:
    """Undo `install`; a model that was not installed is not changed."""
    if isinstance(model, NativeDecoding):
        model.__dict__.pop("_native_decoder", None)
        model.__class__ = _class_before(model)


def why_not(model: Any, usable: Callable[[Any], bool] = lambda linear: isinstance(linear, PackedLinear)) -> str | None:
    """Why the native step cannot decode `model`; None if it can.

    usable: whether a linear is in kernel layout, or can be brought into it.
    """
    if not native.available():
        return native.reason()
    architecture = architecture_of(model)
    if isinstance(architecture, str):
        return architecture
    try:
        reason = _unsupported(model, architecture, usable)
    except AttributeError as error:
        return f"{type(model).__name__} of this version of transformers has no native step: {error}"
    if reason is not None:
        return reason
    if model.dtype not in DTYPES:
        return f"activations in {model.dtype} have no native step"
    if _hooked(model):
        return "a hook of a module inside the model would not be called"
    return None


def _unsupported(model: Any, architecture: Architecture, usable: Callable[[Any], bool]) -> str | None:
    """What the native step does not support of the modules of `model`."""
    traits = traits_of(model, architecture)
    if isinstance(traits, str):
        return traits
    for name, linear in linears_of(model, architecture):
        if not usable(linear):
            return f"{name} is not in kernel layout"
    return None


def _hooked(model: Any) -> bool:
    """Whether a module inside `model` has a hook, other than those that transformers leaves after hidden states were requested."""
    modules = [module for child in model.children() for module in child.modules()]
    hooks = [
        hook for module in modules for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


class NativeDecoding:
    """The methods that `install` adds to the class of a model."""

    _native_decoder: NativeDecoder | None = None

    @property
    def native_decoder(self) -> NativeDecoder:
        """The native step over the tensors that the model had when it last read a prompt."""
        decoder = self._native_decoder
        if decoder is None:
            decoder = self._native_decoder = NativeDecoder(self)
        return decoder

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle cannot find the class by name, and a copy needs a decoder of its own tensors.
        state = {name: value for name, value in self.__dict__.items() if name != "_native_decoder"}
        return _revive, (_class_before(self),), state


def _class_before(model: NativeDecoding) -> type:
    """The transformers class that `model` had before `install`."""
    return type(model).__mro__[2]


def _revive(dense: type) -> Any:
    """An empty model of the native subclass of `dense`, for copies and pickles."""
    native_class: Any = _native_class(dense)
    return native_class.__new__(native_class)


@cache
def _native_class(dense: type) -> type:
    """A subclass of a transformers model class, with the same name, that decodes natively if possible."""
    cache_name = cache_argument(dense.forward)  # type: ignore[attr-defined]
    mixture = ARCHITECTURES[dense.__name__].mixture is not None
    output = MoeCausalLMOutputWithPast if mixture else CausalLMOutputWithPast

    @wraps(dense.forward)  # type: ignore[attr-defined]  # transformers reads its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return dense.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        new, cache = None if args else new_tokens(self, kwargs, cache_name), cache_of(kwargs, cache_name)
        if new is None or not cache.get_seq_length():
            self._native_decoder = None  # weights may have changed since the last prompt
        if new is None or not _handles(self, new, cache):
            return dense.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if new.plain:
            logits = self.native_decoder.step(int(new.tokens), cache)[None, None]
        else:
            logits = self.native_decoder.read(new.tokens, cache, new.positions, new.first, new.wanted)
        return output(logits=logits.to(self.dtype), **{cache_name: cache})

    @wraps(dense.generate)  # type: ignore[attr-defined]
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if wants_growing_cache(self, args, kwargs):
            kwargs[cache_name] = GrowingCache(config_of(self).num_hidden_layers)
        return dense.generate(self, *args, **kwargs)  # type: ignore[attr-defined]

    body = {"forward": forward, "generate": generate, "__module__": dense.__module__, "__doc__": dense.__doc__}
    return type(dense.__name__, (NativeDecoding, dense), body)


def _handles(model: NativeDecoding, new: NewTokens, cache: GrowingCache) -> bool:
    """Whether the native step of `model` takes a call's new tokens."""
    if model._native_decoder is None and why_not(model) is not None:
        return False
    count = new.tokens.shape[1]
    return count == 1 or model.native_decoder.takes_prompt(cache.get_seq_length() + count)
