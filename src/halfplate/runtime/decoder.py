"""Reading prompts and decoding in native calls, also inside transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
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


class _Told(BaseStreamer):
    """Passes on the tokens that `generate` emits, except the prompt, which it emits first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._prompt = on_token, True

    def put(self, value: Tensor) -> None:
        for token in [] if self._prompt else value.flatten().tolist():
            self._on_token(token)
        self._prompt = False

    def end(self) -> None:
        pass


@plain_defaults()
@torch.no_grad()
def greedy(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    stop_ids: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
    cache: GrowingCache | None = None,
) -> Tensor:
    """Continue `ids`, int64 (1, L), greedily: (1, at most L + new_tokens), fewer if one of `stop_ids` occurs.

    It runs natively if the model is installed, otherwise by transformers' `generate`.

    on_token: called with each new token immediately.
    cache: of the first tokens of `ids`, fewer than L; afterwards of all tokens but the last. Only the native path uses it.
    Raises HalfplateError for a batch.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise HalfplateError(f"ids has shape {tuple(ids.shape)}, expected one sequence of at least one token: (1, L)")
    if new_tokens < 1:
        return ids
    if not isinstance(model, NativeDecoding) or why_not(model) is not None:
        # The end token is an ordinary token unless it is in `stop_ids`.
        settings: dict[str, Any] = {
            "do_sample": False,
            "repetition_penalty": 1.0,
            "eos_token_id": sorted(stop_ids) or None,
        }
        settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        if on_token is not None:
            settings["streamer"] = _Told(on_token)
        continued: Tensor = model.generate(ids, max_new_tokens=new_tokens, **settings)
        return continued
    if cache is None:
        cache = GrowingCache(config_of(model).num_hidden_layers)
    settings = {cache_argument(model.forward): cache, "use_cache": True, "logits_to_keep": 1}  # type: ignore[attr-defined]
    logits = model(input_ids=ids[:, cache.get_seq_length() :], **settings).logits[0, -1]  # type: ignore[operator]
    decoder = model.native_decoder
    tokens: list[int] = []
    while True:
        tokens.append(int(logits.argmax()))
        if on_token is not None:
            on_token(tokens[-1])
        if len(tokens) == new_tokens or tokens[-1] in stop_ids:
            break
        if cache.get_seq_length() == decoder.short_length:
            # From here on, all keys have other angles: they are computed again, as in `generate`.
            cache.crop(-cache.get_seq_length())
            text = torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype, device=ids.device)], dim=1)
            logits = model(input_ids=text, **settings).logits[0, -1]  # type: ignore[operator]
            continue
        logits = decoder.step(tokens[-1], cache).to(logits.dtype)
    return torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype, device=ids.device)], dim=1)
