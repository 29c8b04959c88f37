"""One token of one sequence in one native call, for models of Llama's shape, also inside transformers' own `generate`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.linear import PackedLinear

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Their tables depend on how long the sequence is.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# What a call with one new token may say besides its cache, and the values that leave the native step right.
HARMLESS = {"output_attentions": (None, False), "output_hidden_states": (None, False), "labels": (None,)} | {
    "inputs_embeds": (None,),
    "return_dict": (None, True),
    "use_cache": (None, True),
}


class BlockStruct(ctypes.Structure):
    """Mirror of `halfplate::DecoderBlock` in kernels/src/runtime.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("input_norm", "post_norm", "q", "k", "v", "o", "gate", "up", "down", "keys", "values")
    ]


class DecoderStruct(ctypes.Structure):
    """Mirror of `halfplate::Decoder` in kernels/src/runtime.h."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary")],
        *[(name, ctypes.c_int64) for name in ("blocks", "capacity")],
        *[(name, ctypes.c_float) for name in ("epsilon", "embedding_scale", "attention_scale")],
        *[(name, ctypes.c_void_p) for name in ("cosines", "sines", "final_norm", "head")],
        ("block", ctypes.POINTER(BlockStruct)),
        ("scratch", ctypes.c_void_p),
    ]


def install(model: Any) -> str:
    """Let `model` decode natively, one token of one sequence at a time; returns `native`, or why it cannot.

    The model's class becomes a subclass of its own; all calls that are not of that kind run as before.
    """
    reason = why_not(model)
    if reason is None and not isinstance(model, NativeDecoding):
        model.__class__ = _native_class(type(model))  # type: ignore[arg-type]
    return reason or "native"


def uninstall(model: Any) -> None:
    """Undo `install`; a model that was not installed stays as it is."""
    if isinstance(model, NativeDecoding):
        model.__dict__.pop("_native_decoder", None)
        model.__class__ = type(model).__mro__[2]


def why_not(model: Any) -> str | None:
    """Why the native step cannot decode `model`; None where it can."""
    if not native.available():
        return native.reason()
    if type(model).__name__ not in ARCHITECTURES:
        return f"{type(model).__name__} is not of Llama's shape; there are native steps for {', '.join(ARCHITECTURES)}"
    config = model.config
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r} has no native step"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        return "attention in a sliding window has no native step"
    if model.model.rotary_emb.rope_type in LENGTH_DEPENDENT_ROPE:
        return f"rotary embeddings of type {model.model.rotary_emb.rope_type!r} have no native step"
    for name in (f"model.layers.{i}.{part}" for i in range(len(model.model.layers)) for part in LINEARS + MLP):
        if not isinstance(model.get_submodule(name), PackedLinear):
            return f"{name} is not in kernel layout"
    if not isinstance(model.lm_head, PackedLinear):
        return "lm_head is not in kernel layout"
    return None


class NativeDecoder:
    """The weights of a model as the native step reads them, and the cache it was last called with.

    Holds addresses of the model's tensors: it is made anew for a copy of the model, and after `accelerate`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        config, inner = model.config, model.model
        self._norms: list[Tensor] = []
        blocks = (BlockStruct * len(inner.layers))()
        for block, layer in zip(blocks, inner.layers, strict=True):
            block.input_norm = self._norm(layer.input_layernorm)
            block.post_norm = self._norm(layer.post_attention_layernorm)
            for name in LINEARS + MLP:
                field = name.rpartition(".")[2].removesuffix("_proj")
                setattr(block, field, layer.get_submodule(name).packed.data_ptr())
        attention = inner.layers[0].self_attn
        self._blocks = blocks
        self._struct = DecoderStruct(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            intermediate=inner.layers[0].mlp.gate_proj.out_features,
            vocabulary=model.lm_head.out_features,
            blocks=len(blocks),
            epsilon=config.rms_norm_eps,
            embedding_scale=1.0,
            attention_scale=attention.scaling,
            final_norm=self._norm(inner.norm),
            head=model.lm_head.packed.data_ptr(),
            block=blocks,
        )
        self._bound: tuple[Any, ...] = ()
        self._step = native.library().halfplate_step

    def __deepcopy__(self, memo: Any) -> None:
        return None  # addresses of another model's tensors; the copy makes its own

    def _norm(self, module: Any) -> int:
        weight = module.weight.detach().to(torch.float32).contiguous()
        self._norms.append(weight)
        return int(weight.data_ptr())

    @torch.no_grad()
    def step(self, token: int, cache: GrowingCache) -> Tensor:
        """Logits (vocabulary,), fp32, after `token`, whose keys and values are added to `cache`.

        The cache must fit (`fits_one_sequence_in_floats`) and hold at least one position.
        """
        layers: Any = cache.layers
        position = layers[0].length
        for layer in layers if position + 1 > layers[0].capacity else ():
            layer.reserve(position + 1)
        threads = torch.get_num_threads()
        key = (id(cache), layers[0].moves, layers[0].capacity, layers[0].key_buffer.data_ptr(), threads)
        if key != self._bound:
            self._bind(cache, threads)
            self._bound = key
        embedding = self._embedding(token)
        logits = torch.empty(self._struct.vocabulary)
        self._step(ctypes.byref(self._struct), embedding.data_ptr(), position, logits.data_ptr(), threads)
        for layer in layers:
            layer.length = position + 1
        return logits

    def _embedding(self, token: int) -> Tensor:
        weight = self._model.model.embed_tokens.weight
        if not 0 <= token < weight.shape[0]:
            raise HalfplateError(f"token={token} is outside the vocabulary of {weight.shape[0]}")
        row: Tensor = weight[token].to(torch.float32)
        return row

    def _bind(self, cache: GrowingCache, threads: int) -> None:
        layers: Any = cache.layers
        struct, capacity = self._struct, layers[0].capacity
        for block, layer in zip(self._blocks, layers, strict=True):
            assert layer.capacity == capacity
            block.keys, block.values = layer.key_buffer.data_ptr(), layer.value_buffer.data_ptr()
        positions = torch.arange(capacity)[None]
        tables = self._model.model.rotary_emb(torch.empty(1, dtype=torch.float32), positions)
        self._tables = [table[0].to(torch.float32).contiguous() for table in tables]
        struct.cosines, struct.sines = (table.data_ptr() for table in self._tables)
        struct.capacity = capacity
        floats = native.library().halfplate_decoder_scratch(ctypes.byref(struct), threads)
        self._scratch = torch.empty(floats + 16)
        struct.scratch = self._scratch.data_ptr() + -self._scratch.data_ptr() % 64


class NativeDecoding:
    """What a model's class gains by `install`."""

    _native_decoder: NativeDecoder | None = None

    @property
    def native_decoder(self) -> NativeDecoder:
        """The native step over the model's present tensors."""
        if self._native_decoder is None:
            object.__setattr__(self, "_native_decoder", NativeDecoder(self))
        decoder = self._native_decoder
        assert decoder is not None
        return decoder


@cache
def _native_class(dense: type) -> type:
    """A subclass of a transformers model class, of the same name, that decodes natively where it can."""

    @wraps(dense.forward)  # type: ignore[attr-defined]  # transformers reads its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = None if args or torch.compiler.is_compiling() else _single_token(self, kwargs)
        if token is None:
            return dense.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        cache = kwargs["past_key_values"]
        logits = self.native_decoder.step(token, cache)[None, None].to(self.dtype)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @wraps(dense.generate)  # type: ignore[attr-defined]
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _wants_growing_cache(self, args, kwargs):
            kwargs["past_key_values"] = GrowingCache(self.config.num_hidden_layers)
        return dense.generate(self, *args, **kwargs)  # type: ignore[attr-defined]

    body = {"forward": forward, "generate": generate, "__module__": dense.__module__, "__doc__": dense.__doc__}
    return type(dense.__name__, (NativeDecoding, dense), body)


def _single_token(model: Any, kwargs: dict[str, Any]) -> int | None:
    """The new token of a call that the native step answers, else None."""
    cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
    if not isinstance(cache, GrowingCache) or ids is None or tuple(ids.shape) != (1, 1):
        return None
    length = cache.get_seq_length()
    if torch.is_grad_enabled() or model.training or not length or not cache.fits_one_sequence_in_floats:
        return None
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (tuple(mask.shape) != (1, length + 1) or not bool(mask.all())):
        return None
    if positions is not None and positions.tolist() != [[length]]:
        return None
    known = {"past_key_values", "input_ids", "attention_mask", "position_ids", "logits_to_keep", "cache_position"}
    for name, value in kwargs.items():
        if name not in known and (name not in HARMLESS or value not in HARMLESS[name]):
            return None
    return int(ids[0, 0])


def _wants_growing_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` decodes one sequence and leaves the choice of its cache open."""
    config = kwargs.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    return (
        inputs is not None
        and inputs.shape[0] == 1
        and model.dtype == torch.float32
        and setting("use_cache") is not False
        and (setting("num_beams") or 1) == 1
        and (setting("num_return_sequences") or 1) == 1
        and all(
            setting(name) is None
            for name in (
                "past_key_values",
                "cache_implementation",
                "assistant_model",
                "custom_generate",
                "prompt_lookup_num_tokens",
            )
        )
    )


class _Told(BaseStreamer):
    """Passes on what `generate` puts, but for the prompt, which it puts first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._prompt = on_token, True

    def put(self, value: Tensor) -> None:
        for token in [] if self._prompt else value.flatten().tolist():
            self._on_token(token)
        self._prompt = False

    def end(self) -> None:
        pass


@torch.no_grad()
def greedy(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    stop_ids: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue `ids`, int64 (1, L), with the most likely tokens: (1, at most L + new_tokens), less where one of `stop_ids` comes.

    Natively where the model is installed, else by transformers' `generate`. on_token: called with each new token as soon as it
    is known. Raises HalfplateError for a batch.
    """
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise HalfplateError(f"ids has shape {tuple(ids.shape)}, expected one sequence of at least one token: (1, L)")
    if new_tokens < 1:
        return ids
    if not isinstance(model, NativeDecoding) or getattr(model, "dtype", None) != torch.float32:
        ends = {"eos_token_id": sorted(stop_ids)} if stop_ids else {"min_new_tokens": new_tokens}
        settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, **ends}
        if on_token is not None:
            settings["streamer"] = _Told(on_token)
        continued: Tensor = model.generate(ids, max_new_tokens=new_tokens, **settings)
        return continued
    cache = GrowingCache(model.config.num_hidden_layers)  # type: ignore[attr-defined]
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]  # type: ignore[operator]
    decoder = model.native_decoder
    tokens: list[int] = []
    while True:
        tokens.append(int(logits.argmax()))
        if on_token is not None:
            on_token(tokens[-1])
        if len(tokens) == new_tokens or tokens[-1] in stop_ids:
            break
        logits = decoder.step(tokens[-1], cache)
    return torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype)], dim=1)
