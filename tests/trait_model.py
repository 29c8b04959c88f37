"""A decoder of any traits in plain torch: the reference of the native step, written without a look at speed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfplate.models.experts import LinearExperts
from halfplate.models.experts.layout import Joined, Layout
from halfplate.models.experts.module import Expert
from halfplate.runtime.architectures import Architecture

FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x) ** 2,
}


class Weights(nn.Module):
    """The random weight of a norm, and its bias."""

    def __init__(self, count: int, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count))
        self.bias = nn.Parameter(torch.randn(count)) if bias else None
        self.eps = epsilon


class Rotary(nn.Module):
    """Angles of `pairs` pairs of numbers, twice."""

    rope_type = "default"
    config = SimpleNamespace(rope_parameters={"rope_type": "default"})

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.frequencies = 1.0 / 30.0 ** (torch.arange(pairs) / pairs)

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].to(like.dtype) * self.frequencies.to(like.dtype)
        twice = torch.cat((angles, angles), -1)
        return twice.cos(), twice.sin()


class TraitModel(nn.Module):
    """Random weights for an architecture; `sizes` names hidden, heads, kv_heads, head_dim, pairs, intermediate and so on."""

    def __init__(self, architecture: Architecture, sizes: dict[str, Any], entries: dict[str, Any]) -> None:
        super().__init__()
        self.architecture, self.sizes = architecture, sizes
        size = SimpleNamespace(**sizes)
        self.config = SimpleNamespace(
            hidden_size=size.hidden,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            layer_types=size.layer_types,
            sliding_window=size.window,
            **entries,
        )
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.model.rotary_emb = Rotary(size.pairs)
        self.model.norm = self._norm(size.hidden)
        self.model.layers = nn.ModuleList(self._layer(number) for number in range(len(size.layer_types)))
        self.lm_head = self._linear(size.vocabulary, size.hidden)

    def _linear(self, d_out: int, d_in: int) -> nn.Linear:
        linear = nn.Linear(d_in, d_out, bias=self.sizes["bias"])
        linear.weight.data = torch.randn(d_out, d_in) / d_in**0.5
        return linear

    def _norm(self, count: int) -> Weights:
        return Weights(count, self.architecture.norm.startswith("mean"), 1e-3)

    def _layer(self, number: int) -> nn.Module:
        architecture, size = self.architecture, SimpleNamespace(**self.sizes)
        layer, attention = nn.Module(), nn.Module()
        layer.self_attn = attention
        attention.head_dim, attention.scaling, attention.rotated = size.head_dim, size.scaling, number != size.still
        for name in architecture.norms:
            if name is not None:
                setattr(layer, name, self._norm(size.hidden))
        queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        outputs = [queries + 2 * keys] if len(architecture.qkv) == 1 else [queries, keys, keys]
        for name, d_out in zip(architecture.qkv, outputs, strict=True):
            setattr(attention, name.split(".")[1], self._linear(d_out, size.hidden))
        attention.o_proj = self._linear(size.hidden, queries)
        for name, heads in zip(architecture.head_norms or (), (size.heads, size.kv_heads), strict=False):
            count = size.head_dim * (heads if architecture.whole_norms else 1)
            setattr(attention, name.split(".")[1], self._norm(count))
        if architecture.sinks is not None:
            attention.sinks = nn.Parameter(torch.randn(size.heads))
        layer.mlp = nn.Module()
        if architecture.mixture is None or number == size.ordinary:
            self._mlp(layer.mlp, [name.split(".")[1] for name in architecture.mlp], size.intermediate)
        else:
            self._mixture(layer)
        return layer

    def _mlp(self, module: nn.Module, names: list[str], intermediate: int) -> None:
        hidden, gated = self.sizes["hidden"], self.architecture.gated
        for name in names[:-1]:
            setattr(module, name, self._linear(intermediate * (2 if gated and len(names) == 2 else 1), hidden))
        setattr(module, names[-1], self._linear(hidden, intermediate))

    def _mixture(self, layer: nn.Module) -> None:
        routing, size = self.architecture.mixture, SimpleNamespace(**self.sizes)
        assert routing is not None
        gated, experts = self.architecture.gated, []
        first = ("gate_proj", "up_proj") if gated else ("up_proj",)
        joined = (
            Joined("first", (size.experts, len(first) * size.intermediate, size.hidden), first),
            Joined("down_proj", (size.experts, size.hidden, size.intermediate), ("down_proj",)),
        )
        layout = Layout(size.experts, joined)
        for _ in range(size.experts):
            expert = Expert()
            for name in layout.linears[:-1]:
                setattr(expert, name, self._linear(size.intermediate, size.hidden))
            expert.down_proj = self._linear(size.hidden, size.intermediate)
            experts.append(expert)
        layer.mlp.experts = LinearExperts(nn.Module(), layout, experts)
        layer.mlp.experts.alpha, layer.mlp.experts.limit = 1.7, 0.6
        layer.mlp.gate = self._linear(size.experts, size.hidden)
        layer.mlp.gate.top_k = size.chosen
        if routing.shared:
            layer.shared = nn.Module()
            self._mlp(layer.shared, [name.split(".")[1] for name in routing.shared], size.intermediate + 7)
        if routing.shared_gate is not None:
            layer.shared.weigh = self._linear(1, size.hidden)

    def logits(self, ids: Tensor, first: Tensor) -> Tensor:
        """Logits (sequences, length, vocabulary) in fp64 of `ids`, of which `first` are padding; those of padding have no meaning."""
        model = self.double()
        x = model.model.embed_tokens(ids) * getattr(self.config, "embedding_scale", 1.0)
        for number, layer in enumerate(model.model.layers):
            x = self._block(layer, number, x, first)
        x = model.lm_head(self._normed(model.model.norm, x)) * getattr(self.config, "logit_scale", 1.0)
        x = x / getattr(self.config, "logit_divisor", 1.0)
        return _capped(x, getattr(self.config, "logit_cap", None))

    def _block(self, layer: Any, number: int, x: Tensor, first: Tensor) -> Tensor:
        norms = [getattr(layer, name) if name else None for name in self.architecture.norms]
        scale = getattr(self.config, "residual_scale", 1.0)
        seen = self._normed(norms[0], x)
        x = x + scale * self._normed(norms[1], self._attention(layer.self_attn, number, seen, first))
        if not self.architecture.parallel:
            seen = self._normed(norms[2], x)
        return x + scale * self._normed(norms[3], self._feed_forward(layer, seen))

    def _normed(self, norm: Weights | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        kind = self.architecture.norm
        weight = norm.weight + (1 if kind.endswith("+1") else 0)
        if kind.startswith("mean"):
            return functional.layer_norm(x, x.shape[-1:], weight, norm.bias, norm.eps)
        return functional.rms_norm(x, x.shape[-1:], weight, norm.eps)

    def _attention(self, attention: Any, number: int, x: Tensor, first: Tensor) -> Tensor:
        architecture, size = self.architecture, SimpleNamespace(**self.sizes)
        parts = torch.cat([getattr(attention, name.split(".")[1])(x) for name in architecture.qkv], -1)
        widths = [size.heads * size.head_dim, size.kv_heads * size.head_dim, size.kv_heads * size.head_dim]
        query, key, value = parts.split(widths, -1)
        norms = [getattr(attention, name.split(".")[1]) for name in architecture.head_norms or ()]
        if norms and architecture.whole_norms:
            query, key = self._normed(norms[0], query), self._normed(norms[1], key)
        query, key, value = (part.unflatten(-1, (-1, size.head_dim)).transpose(1, 2) for part in (query, key, value))
        separate = bool(norms) and not architecture.whole_norms
        if separate and not architecture.late_norms:
            query, key = self._normed(norms[0], query), self._normed(norms[1], key)
        if attention.rotated:
            query, key = self._rotated(query, first), self._rotated(key, first)
        if separate and architecture.late_norms:
            query, key = self._normed(norms[0], query), self._normed(norms[1], key)
        key, value = (part.repeat_interleave(size.heads // size.kv_heads, 1) for part in (key, value))
        scores = _capped(query @ key.mT * size.scaling, getattr(self.config, "attention_cap", None))
        at = torch.arange(x.shape[1])
        read = (at[None, None] <= at[None, :, None]) & (at >= first[:, None])[:, None]
        windows = architecture.windows
        if windows == "all" or (windows == "by layer" and size.layer_types[number] == "sliding_attention"):
            read = read & (at[None, None] > at[None, :, None] - size.window)
        read = read | torch.eye(
            x.shape[1], dtype=torch.bool
        )  # padding reads itself, because no score at all would be NaN
        scores = scores.masked_fill(~read[:, None], -torch.inf)
        if architecture.sinks is not None:
            sinks = attention.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : x.shape[1]]
        return attention.o_proj((weights @ value).transpose(1, 2).flatten(2))

    def _rotated(self, heads: Tensor, first: Tensor) -> Tensor:
        positions = (torch.arange(heads.shape[2]) - first[:, None]).clamp_min(0)
        cosines, sines = (table[:, None, :, : self.sizes["pairs"]] for table in self.model.rotary_emb(heads, positions))
        width = 2 * self.sizes["pairs"]
        turned, rest = heads[..., :width], heads[..., width:]
        pairs = self.architecture.rotation == "pairs"
        a, b = (turned[..., ::2], turned[..., 1::2]) if pairs else turned.chunk(2, -1)
        c, d = a * cosines - b * sines, b * cosines + a * sines
        turned = torch.stack((c, d), -1).flatten(-2) if pairs else torch.cat((c, d), -1)
        return torch.cat((turned, rest), -1)

    def _feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        if not hasattr(layer.mlp, "experts"):
            return self._mlp_output([getattr(layer.mlp, name.split(".")[1]) for name in self.architecture.mlp], x)
        routing = self.architecture.mixture
        assert routing is not None
        probabilities = layer.mlp.gate(x).softmax(-1)
        weights, chosen = probabilities.topk(self.sizes["chosen"])
        if routing.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        leaves = layer.mlp.experts.layout.linears
        outputs = torch.stack(
            [self._mlp_output([getattr(expert, leaf) for leaf in leaves], x) for expert in layer.mlp.experts.experts],
            -2,
        )
        result = (outputs.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1])) * weights[..., None]).sum(-2)
        if routing.shared:
            shared = self._mlp_output([getattr(layer.shared, name.split(".")[1]) for name in routing.shared], x)
            result = result + shared * (layer.shared.weigh(x).sigmoid() if routing.shared_gate is not None else 1)
        return result

    def _mlp_output(self, linears: list[nn.Module], x: Tensor) -> Tensor:
        gate = torch.cat([linear(x) for linear in linears[:-1]], -1)
        if self.architecture.clamped:
            gate, up = gate.chunk(2, -1)
            gate, up = gate.clamp(max=0.6), up.clamp(-0.6, 0.6)
            return linears[-1](gate * (1.7 * gate).sigmoid() * (1 + up))
        function = FUNCTIONS[self.config.hidden_act]
        if not self.architecture.gated:
            return linears[-1](function(gate))
        gate, up = gate.chunk(2, -1)
        return linears[-1](function(gate) * up)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
