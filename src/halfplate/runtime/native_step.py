"""The native step of a model: its weights and traits as structures for the kernels, and a call per token."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Lock
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.kernels.linear import CPU
from halfplate.runtime.architectures import architecture_of, inner_of
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.embedding import StoredEmbedding
from halfplate.runtime.kept import WHOLE
from halfplate.runtime.native_weights import NativeWeights, Pack, structure_of
from halfplate.runtime.structures import BatchStruct
from halfplate.runtime.traits import rotary_tables, short_length, traits_of

CACHE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}  # halfplate::Kind in kernels/src/runtime.h
ROWS_AT_ONCE = 512  # of a prompt


class NativeDecoder:
    """The weights of a model for the native step, and the cache of the last call.

    It holds addresses of the model's tensors and keeps them alive; later changes of the weights are not seen.

    pack: returns the linear in kernel layout for one of the model, for models whose linears are not.
    """

    def __init__(self, model: Any, pack: Pack = lambda linear: linear) -> None:
        architecture = architecture_of(model)
        traits = architecture if isinstance(architecture, str) else traits_of(model, architecture)
        if isinstance(architecture, str) or isinstance(traits, str):
            raise HalfplateError(f"the model cannot decode natively: {traits}")
        self.traits = traits
        self._angles = architecture.angles
        inner = inner_of(model)
        self._embed, self._rotary = inner.embed_tokens, inner.rotary_emb
        self.short_length, self._uses_short = short_length(self._rotary), True
        # A row of a table of numbers is read without a call of the module, unless that scales it.
        self._rows = self._embed.weight if type(self._embed) in (nn.Embedding, StoredEmbedding) else None
        self._weights = NativeWeights(model, architecture, traits, pack)
        # Others read prompts faster through torch, which multiplies floats faster.
        self.reads_prompts = self._weights.rounded > 0.9 * self._weights.multiplied
        self._blocks = self._weights.blocks
        self._struct = structure_of(self._weights, architecture, traits)
        self._lock = Lock()
        self._cache: Callable[[], GrowingCache | None] = lambda: None
        self._bound, self._sized = (0, 0, 0), (0, 0, 0, 0)
        self._step, self._step_batch = native.library().halfplate_step, native.library().halfplate_step_batch

    @torch.no_grad()
    def step(self, token: int, cache: GrowingCache) -> Tensor:
        """Logits (vocabulary,), fp32, after `token`, whose keys and values are added to `cache`.

        The cache must hold one sequence of at least one position, with keys and values of the shape of this model.
        Raises HalfplateError for another cache, and for a token outside the vocabulary.
        """
        layers: Any = cache.layers
        kept = layers[0].kept_keys
        # Attention to other types is only in the step of rows.
        if kept is not None and kept.numbers.dtype != torch.float32:
            return self.step_rows(torch.tensor([[token]], dtype=torch.int64, device=CPU), cache)[0, 0]
        embedding = self._embedding(token)
        logits = torch.empty(self._struct.vocabulary, dtype=torch.float32, device=CPU)
        with self._lock:
            position, threads = self._prepare(cache, 1)
            self._choose_tables(position)
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

    def step_batch(
        self, tokens: Tensor, cache: GrowingCache, positions: Tensor | None = None, first: Tensor | None = None
    ) -> Tensor:
        """Logits (sequences, vocabulary), fp32, after `tokens` int64 (sequences,); `step_rows` with one token of each sequence."""
        return self.step_rows(tokens[:, None], cache, None if positions is None else positions[:, None], first)[:, 0]

    def read(
        self, tokens: Tensor, cache: GrowingCache, positions: Tensor | None, first: Tensor | None, wanted: int
    ) -> Tensor:
        """`step_rows` for a text of any length, in parts; `cache` may be empty without buffers."""
        sequences, count = tokens.shape
        if not cache.get_seq_length() and cache.sequences != sequences:
            struct, layers = self._struct, cast("Any", cache.layers)
            nothing = torch.empty(
                sequences, struct.kv_heads, 0, struct.head_dim, dtype=self._embed(tokens[:, :1]).dtype, device=CPU
            )
            for layer in layers:
                layer.lazy_initialization(nothing, nothing)
        at_once, logits = max(ROWS_AT_ONCE // sequences, 1), []
        for start in range(0, count, at_once):
            end = min(start + at_once, count)
            part = None if positions is None else positions[:, start:end]
            here = max(end - max(start, count - wanted), 0)
            # Sequences whose text begins after this part read their own positions.
            begin = None if first is None else first.clamp_max(cache.get_seq_length() + end - start - 1)
            logits.append(self.step_rows(tokens[:, start:end], cache, part, begin, here))
        return torch.cat(logits, dim=1)

    def takes_prompt(self, length: int) -> bool:
        """Whether `read` takes a prompt after which the cache has `length` positions, and is faster than torch."""
        return self.reads_prompts and (self.short_length is None or length <= self.short_length)

    @torch.no_grad()
    def step_rows(
        self,
        tokens: Tensor,
        cache: GrowingCache,
        positions: Tensor | None = None,
        first: Tensor | None = None,
        wanted: int | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Logits (sequences, wanted, vocabulary), fp32, after the last tokens of `tokens` int64 (sequences, count).

        Keys and values of all are added to `cache`, which may be empty, if it has buffers (`GrowingCache.with_room`). Each token reads
        those before it. With `longrope`, all tokens have the angles of a text that ends with the last of them.

        positions: int64 (sequences, count), for the rotary embedding, up to the length of the cache after this step; None means places in the cache.
        first: int64 (sequences,), the number of padding positions before each sequence, which are not read; None means 0.
        wanted: of how many of the last tokens of each sequence there are logits, 0 to count; None means all.
        exact: keep the inputs of linears in floats where `--activations auto` would round those of several rows; for rows that stand for single steps.
        Raises HalfplateError for a cache of another number of sequences or another shape, and for a token outside the vocabulary.
        """
        layers: Any = cache.layers
        sequences, count = self._check_rows(tokens, cache)
        wanted = count if wanted is None else wanted
        if not 0 <= wanted <= count:
            raise HalfplateError(f"wanted={wanted} is out of range; expected 0 to {count}, the tokens of each sequence")
        embeddings = self._embed(tokens).detach().to(torch.float32).contiguous()
        logits = torch.empty(sequences, wanted, self._struct.vocabulary, dtype=torch.float32, device=CPU)
        with self._lock:
            slot, threads = self._prepare(cache, sequences, count)
            self._choose_tables(slot + count - 1 if positions is None else int(positions.max()))
            if positions is None:
                positions = torch.arange(slot, slot + count, dtype=torch.int64, device=CPU).repeat(sequences)
            if first is None:
                first = torch.zeros(sequences, dtype=torch.int64, device=CPU)
            held = {"embeddings": embeddings, "positions": positions.contiguous(), "first": first, "logits": logits}
            batch = BatchStruct(slot=slot, count=count, wanted=wanted, exact=exact)
            for place, (name, tensor) in enumerate(held.items()):
                setattr(batch, name, native.address(tensor, tensor.dtype, name))
                batch.bytes[place] = tensor.nbytes
            native.check(self._step_batch(ctypes.byref(self._struct), ctypes.byref(batch), threads), "batch step")
            for layer in layers:
                layer.length = slot + count
        return logits

    def _check_rows(self, tokens: Tensor, cache: GrowingCache) -> tuple[int, int]:
        """The number of sequences and of tokens of each; raises HalfplateError unless the model and the cache can take them."""
        sequences, count = tokens.shape
        outside = (tokens < 0) | (tokens >= self._embed.num_embeddings)
        if bool(outside.any()):
            token = int(tokens[outside][0])
            raise HalfplateError(f"token={token} is outside the vocabulary of {self._embed.num_embeddings}")
        if cache.sequences != sequences:
            raise HalfplateError(
                f"tokens has {sequences} sequences, but the cache holds {cache.sequences or 'no'} sequences of equal length in fp32, bf16 or int8; "
                "pass one token for each sequence of the cache"
            )
        return sequences, count

    def _prepare(self, cache: GrowingCache, sequences: int, count: int = 1) -> tuple[int, int]:
        """Make room for `count` more positions of `sequences` sequences; returns the first of them and the number of threads."""
        layers: Any = cache.layers
        position, threads = layers[0].length, torch.get_num_threads()
        for layer in layers:
            layer.reserve(position + count)
        # Cache layers count their reallocations, so an equal sum means that no buffer has moved.
        bound = (sum(layer.moves for layer in layers), threads, sequences)
        if bound != self._bound or self._cache() is not cache or sequences * count > self._struct.rows:
            self._bind(cache, threads, sequences, sequences * count)
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

    def _bind(self, cache: GrowingCache, threads: int, sequences: int, rows: int) -> None:
        layers: Any = cache.layers
        struct, capacity = self._struct, layers[0].capacity
        expected = (sequences, struct.kv_heads, capacity, struct.head_dim)
        held = cache.sequences
        kept = [buffer for layer in layers for buffer in (layer.kept_keys, layer.kept_values) if buffer is not None]
        shapes = {tuple(buffer.numbers.shape) for buffer in kept}
        if held != sequences or shapes != {expected} or len(layers) != struct.blocks:
            raise HalfplateError(
                f"the cache has {len(layers)} layers of shapes {sorted(shapes)}, expected {struct.blocks} of fp32 {expected}; "
                f"pass one that this model filled with {'one sequence' if sequences == 1 else f'{sequences} sequences'}"
            )
        dtype = cache.kept_dtype
        assert dtype is not None
        if dtype != torch.float32 and struct.head_dim % WHOLE:
            raise HalfplateError(
                f"the cache is in {dtype}, which needs heads of a multiple of {WHOLE} numbers; this model has heads of {struct.head_dim}, "
                "so pass a cache in fp32"
            )
        for block, layer in zip(self._blocks, layers, strict=True):
            for place, (name, own) in enumerate((("keys", layer.kept_keys), ("values", layer.kept_values))):
                setattr(block, name, native.address(own.numbers, dtype, f"the cache of {name}"))
                block.cache_bytes[place] = own.numbers.nbytes
                scales = ("key_scales", "value_scales")[place]
                setattr(
                    block, scales, None if own.scales is None else native.address(own.scales, torch.float32, scales)
                )
                block.cache_bytes[2 + place] = 0 if own.scales is None else own.scales.nbytes
        struct.cache_kind = CACHE_KINDS[dtype]
        # The scratch for many rows also serves fewer.
        rows = max(rows, struct.rows if sequences == struct.sequences else 0)
        if self._sized == (capacity, threads, sequences, rows):
            return
        if self._sized[0] != capacity:
            self._bind_tables(capacity)
        struct.capacity, struct.sequences, struct.rows = capacity, sequences, rows
        floats = native.library().halfplate_decoder_scratch(ctypes.byref(struct), threads)
        native.check(floats, "decoder step")
        scratch = torch.empty(floats + 16, dtype=torch.float32, device=CPU)
        start = -scratch.data_ptr() % 64
        self._scratch, struct.scratch = scratch, scratch.data_ptr() + start
        struct.scratch_bytes = scratch.nbytes - start
        self._sized = (capacity, threads, sequences, rows)

    def _bind_tables(self, capacity: int) -> None:
        self._tables = {
            short: self._rotary_tables(capacity, short)
            for short in (True, False)[: 1 if self.short_length is None else 2]
        }
        self._use_tables(True)

    def _rotary_tables(self, capacity: int, short: bool) -> list[tuple[Tensor, ...]]:
        """Cosines and sines of each layer type."""
        return [rotary_tables(self._rotary, kind, capacity, short, self._angles) for kind in self.traits.tables]

    def _use_tables(self, short: bool) -> None:
        struct, self._uses_short = self._struct, short
        for place, pair in enumerate(self._tables[short]):
            for side, table in enumerate(pair):
                addresses = struct.sines if side else struct.cosines
                addresses[place] = native.address(table, torch.float32, "the rotary embedding")
                struct.table_bytes[2 * side + place] = table.nbytes

    def _choose_tables(self, last: int) -> None:
        """Use the tables of a text that ends at position `last`."""
        if self.short_length is not None and (last < self.short_length) != self._uses_short:
            self._use_tables(last < self.short_length)
