"""Decoding one token of each sequence in one native call, for Llama-like models, also inside transformers' `generate`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from functools import cache, wraps
from threading import Lock
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedEmbedding
from halfplate.kernels import native
from halfplate.kernels.linear import CPU
from halfplate.models.arguments import cache_argument
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.calls import DTYPES, cache_of, new_tokens, wants_growing_cache
from halfplate.runtime.structures import BatchStruct, BlockStruct, DecoderStruct

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Rotary types whose tables depend on the sequence length.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
CACHE_KINDS = {torch.float32: 0, torch.bfloat16: 1}  # halfplate::Kind in kernels/src/runtime.h
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


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
    if type(model).__name__ not in ARCHITECTURES or not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} has no native step, only {', '.join(ARCHITECTURES)} have one"
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
        if not usable(model.get_submodule(name)):
            return f"{name} is not in kernel layout"
    if not usable(model.lm_head):
        return "lm_head is not in kernel layout"
    if model.dtype not in DTYPES:
        return f"activations in {model.dtype} have no native step"
    if _hooked(model):
        return "a hook of a module inside the model would not be called"
    return None


def _hooked(model: Any) -> bool:
    """Whether a module inside `model` has a hook, other than those that transformers leaves after hidden states were requested."""
    modules = [module for child in model.children() for module in child.modules()]
    hooks = [
        hook for module in modules for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


class NativeDecoder:
    """The weights of a model for the native step, and the cache of the last call.

    It holds addresses of the model's tensors and keeps them alive; later changes of the weights are not seen.

    pack: returns the linear in kernel layout for one of the model, for models whose linears are not.
    """

    def __init__(self, model: Any, pack: Callable[[Any], PackedLinear] = lambda linear: linear) -> None:
        config, inner = model.config, model.model
        self._embed, self._rotary = inner.embed_tokens, inner.rotary_emb
        # A row of a table of numbers is read without a call of the module.
        self._rows = None if isinstance(self._embed, CompressedEmbedding) else self._embed.weight
        self._held: list[Tensor] = []
        blocks = (BlockStruct * len(inner.layers))()
        for block, layer in zip(blocks, inner.layers, strict=True):
            norms = [("input_norm", layer.input_layernorm), ("post_norm", layer.post_attention_layernorm)]
            if hasattr(layer.self_attn, "q_norm"):
                norms += [("query_norm", layer.self_attn.q_norm), ("key_norm", layer.self_attn.k_norm)]
            for place, (name, norm) in enumerate(norms):
                address, block.norm_bytes[place] = self._norm(norm)
                setattr(block, name, address)
            for place, name in enumerate(LINEARS + MLP):
                address, block.linear_bytes[place] = self._place(
                    pack(layer.get_submodule(name)).packed, torch.uint8, name
                )
                setattr(block, name.rpartition(".")[2].removesuffix("_proj"), address)
        attention = inner.layers[0].self_attn
        self._blocks = blocks
        final_norm, final_norm_bytes = self._norm(inner.norm)
        head, head_bytes = self._place(pack(model.lm_head).packed, torch.uint8, "lm_head")
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
            final_norm=final_norm,
            final_norm_bytes=final_norm_bytes,
            head=head,
            head_bytes=head_bytes,
            block=blocks,
            block_bytes=ctypes.sizeof(blocks),
            sequences=1,
        )
        self._lock = Lock()
        self._cache: Callable[[], GrowingCache | None] = lambda: None
        self._bound = self._sized = (0, 0, 0)
        self._step, self._step_batch = native.library().halfplate_step, native.library().halfplate_step_batch

    def _norm(self, module: Any) -> tuple[int, int]:
        return self._place(module.weight.detach().to(torch.float32).contiguous(), torch.float32, "the weight of a norm")

    def _place(self, tensor: Tensor, dtype: torch.dtype, name: str) -> tuple[int, int]:
        """The address and the size in bytes of a tensor, which is kept alive."""
        self._held.append(tensor)
        return native.address(tensor, dtype, name), tensor.nbytes

    @torch.no_grad()
    def step(self, token: int, cache: GrowingCache) -> Tensor:
        """Logits (vocabulary,), fp32, after `token`, whose keys and values are added to `cache`.

        The cache must hold one sequence of at least one position, with keys and values of the shape of this model.
        Raises HalfplateError for another cache, and for a token outside the vocabulary.
        """
        layers: Any = cache.layers
        embedding = self._embedding(token)
        logits = torch.empty(self._struct.vocabulary, dtype=torch.float32, device=CPU)
        with self._lock:
            position, threads = self._prepare(cache, 1)
            status = self._step(
                ctypes.byref(self._struct),
                embedding.data_ptr(),
                embedding.nbytes,
                position,
                logits.data_ptr(),
                logits.nbytes,
                threads,
            )
            if status:
                native.check(status, "decoder step")
            for layer in layers:
                layer.length = position + 1
        return logits

    @torch.no_grad()
    def step_batch(
        self, tokens: Tensor, cache: GrowingCache, positions: Tensor | None = None, first: Tensor | None = None
    ) -> Tensor:
        """Logits (sequences, vocabulary), fp32, after `tokens` int64 (sequences,), whose keys and values are added to `cache`.

        positions: int64 (sequences,), for the rotary embedding, up to the length of the cache before this step; None means that.
        first: int64 (sequences,), the number of padding positions before each sequence, which are not read; None means 0.
        Raises HalfplateError for a cache of another number of sequences or another shape, and for a token outside the vocabulary.
        """
        layers: Any = cache.layers
        count, outside = len(tokens), (tokens < 0) | (tokens >= self._embed.num_embeddings)
        if bool(outside.any()):
            token = int(tokens[outside][0])
            raise HalfplateError(f"token={token} is outside the vocabulary of {self._embed.num_embeddings}")
        if cache.sequences != count:
            raise HalfplateError(
                f"tokens has {count} sequences, but the cache holds {cache.sequences or 'no'} sequences of equal length in fp32; "
                "pass one token for each sequence of the cache"
            )
        embeddings = self._embed(tokens).detach().to(torch.float32).contiguous()
        logits = torch.empty(count, self._struct.vocabulary, dtype=torch.float32, device=CPU)
        with self._lock:
            slot, threads = self._prepare(cache, count)
            if positions is None:
                positions = torch.full((count,), slot, dtype=torch.int64, device=CPU)
            if first is None:
                first = torch.zeros(count, dtype=torch.int64, device=CPU)
            held = {"embeddings": embeddings, "positions": positions, "first": first, "logits": logits}
            batch = BatchStruct(slot=slot)
            for place, (name, tensor) in enumerate(held.items()):
                setattr(batch, name, native.address(tensor, tensor.dtype, name))
                batch.bytes[place] = tensor.nbytes
            native.check(self._step_batch(ctypes.byref(self._struct), ctypes.byref(batch), threads), "batch step")
            for layer in layers:
                layer.length = slot + 1
        return logits

    def _prepare(self, cache: GrowingCache, sequences: int) -> tuple[int, int]:
        """Make room for one more position of `sequences` sequences; returns the position and the number of threads."""
        layers: Any = cache.layers
        position, threads = layers[0].length, torch.get_num_threads()
        for layer in layers:
            layer.reserve(position + 1)
        # Cache layers count their reallocations, so an equal sum means that no buffer has moved.
        bound = (sum(layer.moves for layer in layers), threads, sequences)
        if bound != self._bound or self._cache() is not cache:
            self._bind(cache, threads, sequences)
            self._bound, self._cache = bound, ref(cache)
        return position, threads

    def _embedding(self, token: int) -> Tensor:
        if not 0 <= token < self._embed.num_embeddings:
            raise HalfplateError(f"token={token} is outside the vocabulary of {self._embed.num_embeddings}")
        if self._rows is not None:
            found: Tensor = self._rows[token].detach()
        else:
            found = self._embed(torch.tensor([token], dtype=torch.int64, device=CPU))[0]
        row = found.to(torch.float32).contiguous()
        native.address(row, torch.float32, "the embedding")
        return row

    def _bind(self, cache: GrowingCache, threads: int, sequences: int) -> None:
        layers: Any = cache.layers
        struct, capacity = self._struct, layers[0].capacity
        expected = (sequences, struct.kv_heads, capacity, struct.head_dim)
        shapes = {tuple(buffer.shape) for layer in layers for buffer in (layer.key_buffer, layer.value_buffer)}
        held = cache.sequences
        if held != sequences or shapes != {expected} or len(layers) != struct.blocks:
            raise HalfplateError(
                f"the cache has {len(layers)} layers of shapes {sorted(shapes)}, expected {struct.blocks} of fp32 {expected}; "
                f"pass one that this model filled with {'one sequence' if sequences == 1 else f'{sequences} sequences'}"
            )
        dtype = layers[0].key_buffer.dtype
        for block, layer in zip(self._blocks, layers, strict=True):
            for place, (name, buffer) in enumerate((("keys", layer.key_buffer), ("values", layer.value_buffer))):
                setattr(block, name, native.address(buffer, dtype, f"the cache of {name}"))
                block.cache_bytes[place] = buffer.nbytes
        struct.cache_kind = CACHE_KINDS[dtype]
        if self._sized == (capacity, threads, sequences):
            return
        like = torch.empty(1, dtype=torch.float32, device=CPU)
        tables = self._rotary(like, torch.arange(capacity, dtype=torch.int64, device=CPU)[None])
        self._tables = [table[0].detach().to(torch.float32).contiguous() for table in tables]
        struct.cosines, struct.sines = (
            native.address(table, torch.float32, "the rotary embedding") for table in self._tables
        )
        struct.table_bytes[:] = [table.nbytes for table in self._tables]
        struct.capacity, struct.sequences = capacity, sequences
        floats = native.library().halfplate_decoder_scratch(ctypes.byref(struct), threads)
        native.check(floats, "decoder step")
        scratch = torch.empty(floats + 16, dtype=torch.float32, device=CPU)
        start = -scratch.data_ptr() % 64
        self._scratch, struct.scratch = scratch, scratch.data_ptr() + start
        struct.scratch_bytes = scratch.nbytes - start
        self._sized = (capacity, threads, sequences)


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

    @wraps(dense.forward)  # type: ignore[attr-defined]  # transformers reads its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return dense.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        new = None if args else new_tokens(self, kwargs, cache_name)
        if new is None or (self._native_decoder is None and why_not(self) is not None):
            self._native_decoder = None  # weights may have changed since the last prompt
            return dense.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        cache = cache_of(kwargs, cache_name)
        if new.plain:
            logits = self.native_decoder.step(int(new.tokens[0]), cache)[None]
        else:
            logits = self.native_decoder.step_batch(new.tokens, cache, new.positions, new.first)
        return CausalLMOutputWithPast(logits=logits[:, None].to(self.dtype), **{cache_name: cache})

    @wraps(dense.generate)  # type: ignore[attr-defined]
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if wants_growing_cache(self, args, kwargs):
            kwargs[cache_name] = GrowingCache(self.config.num_hidden_layers)
        return dense.generate(self, *args, **kwargs)  # type: ignore[attr-defined]

    body = {"forward": forward, "generate": generate, "__module__": dense.__module__, "__doc__": dense.__doc__}
    return type(dense.__name__, (NativeDecoding, dense), body)


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
        cache = GrowingCache(model.config.num_hidden_layers)  # type: ignore[attr-defined]
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
        logits = decoder.step(tokens[-1], cache).to(logits.dtype)
    return torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype, device=ids.device)], dim=1)
