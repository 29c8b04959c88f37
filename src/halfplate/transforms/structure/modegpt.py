"""MoDeGPT: three products of each layer, each replaced by the nearest product through fewer dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from halfplate.models.gguf_families.rope import spectrum
from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.base import MeasuredTransform, Probe, Settled, Statistics, making
from halfplate.transforms.structure.graph import CHANNELS, PAIRS, PREFIX, StructureGraph
from halfplate.transforms.structure.least_squares import DAMPING, factor_of, refitted
from halfplate.transforms.structure.probes import Gram, rows, stored
from halfplate.transforms.structure.scored import DOWN, Cutter, Layer, best, layer_of
from halfplate.transforms.structure.shrinking import Shrinking, Target
from halfplate.transforms.structure.widths import one_size, two_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of the leverage scores, relative to the mean of the diagonal. Between 0.001 and 10, the KL of SmolLM2-135M at keep 0.75 is least at 1: 1.28
# against 1.32 at 0.01.
RIDGE = 1.0
SCALINGS = ("default", "linear", "llama3")  # of RoPE, whose frequencies do not depend on the length of the text
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{name}_proj" for name in "qkvo")


@dataclass(frozen=True)
class MoDeGPT(Shrinking, MeasuredTransform):
    """Makes the MLP and the heads narrower, each by a closed form, with the statistics of what flows between two matrices.

    - up, gate and down (Nyström): the channels with the largest ridge leverage stay, and down is refitted to reproduce its outputs.
    - q and k (CR): the pairs of values stay whose products are largest. RoPE turns pair i of every head by one frequency, so all heads and
      layers keep the same pairs, and the configuration holds their frequencies (`longrope` with equal factors). The paper keeps other pairs
      in each head, which no plain configuration can say.
    - v and o (SVD): the directions stay that matter for the outputs of all heads of q that share a head of v.

    Every layer is as wide as the others; the paper narrows some layers more. Heads keep their size in models that normalise q and k in
    each head (Qwen3), that have no size of heads (Qwen2), or whose RoPE depends on the length of the text.

    Source: MoDeGPT, arXiv 2408.09632.
    """

    name = "modegpt"
    version = 1
    summary = "make the MLP and the heads narrower by Nyström, CR and SVD approximations of the products in a layer"

    def sizes(self, graph: StructureGraph, budget: int) -> dict[str, int]:
        if not _narrows_heads(graph.config):
            return one_size(graph, CHANNELS, budget, self.keep)
        return two_sizes(graph, PAIRS, budget, self.keep)

    def probe(self, source: Source, layer: int) -> Flows:
        return Flows(_smaller(self.target(source)))

    def statistics_nbytes(self, source: Source) -> int:
        graph = StructureGraph.of(source)
        values = graph.heads * graph.head_dim
        return 4 * (graph.size(CHANNELS) ** 2 + values * (graph.head_dim + graph.queries + 1))

    def held_nbytes(self, source: Source) -> int:
        # The second moments of the channels in fp64, a batch of them, and what solving with them needs.
        return super().held_nbytes(source) + 4 * 8 * int(source.config.intermediate_size) ** 2

    def settled(self, source: Source, statistics: Statistics) -> Settled:
        target = self.target(source)
        pairs = _chosen_pairs(target, statistics) if PAIRS in _smaller(target) else None
        modules = _Modules(StreamedModel(source), target, statistics, pairs)
        config = target.configuration
        if pairs is not None:
            config.rope_parameters = _frequencies(source.config, target.graph, pairs)
        return Settled(config, making(modules.tensor))


def _narrows_heads(config: PretrainedConfig) -> bool:
    rope = config.rope_parameters
    plain = rope.get("rope_type", "default") in SCALINGS and rope.get("partial_rotary_factor", 1.0) == 1.0
    return config.model_type in ("llama", "mistral") and plain


def _smaller(target: Target) -> tuple[str, ...]:
    """The kinds of dimensions that shrink."""
    return tuple(kind for kind, units in target.sizes.items() if units < target.graph.size(kind))


class Flows(Probe):
    """Second moments between the matrices of a layer, as far as the kinds of dimensions in `kinds` need them.

    `channels` (n, n) of the inputs of down; `queries` and `keys`, one number for each output of q and k; `values` (heads, d, d) of the
    outputs of v inside each head.
    """

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        self.grams: dict[str, Gram] = {}
        self._squares: dict[str, tuple[int, Tensor]] = {}
        self._heads: list[Gram] = []

    def watch(self, layer: nn.Module) -> list[RemovableHandle]:
        found = []
        if CHANNELS in self.kinds:
            self.grams["channels"] = Gram()
            found.append(layer.get_submodule(DOWN).register_forward_pre_hook(self._add_channels))
        if PAIRS in self.kinds:
            attention: Any = layer.get_submodule("self_attn")
            for name, module in (("queries", QUERY), ("keys", KEY)):
                found.append(layer.get_submodule(module).register_forward_hook(partial(self._add_squares, name)))
            count = attention.v_proj.out_features // attention.head_dim
            self._heads = [Gram() for _ in range(count)]
            found.append(attention.v_proj.register_forward_hook(self._add_values))
        return found

    def _add_channels(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.grams["channels"].add(args[0])

    def _add_squares(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        squares = rows(output).square()
        count, total = self._squares.get(name, (0, torch.zeros_like(squares[0], dtype=torch.float64)))
        self._squares[name] = count + len(squares), total + squares.sum(0, dtype=torch.float64)

    def _add_values(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        for gram, values in zip(self._heads, output.chunk(len(self._heads), dim=-1), strict=True):
            gram.add(values)

    def statistics(self) -> dict[str, Tensor]:
        found = {name: stored(gram.mean) for name, gram in self.grams.items()}
        found |= {name: stored(total / count) for name, (count, total) in self._squares.items()}
        if self._heads:
            found["values"] = stored(torch.stack([gram.mean for gram in self._heads]))
        return found or {"nothing": torch.zeros(1, dtype=torch.float32, device="cpu")}


class _Modules:
    """Makes the tensors of the result one by one; what belongs to the current layer is remembered."""

    def __init__(self, model: StreamedModel, target: Target, statistics: Statistics, pairs: Tensor | None) -> None:
        self.target, self.graph, self.pairs = target, target.graph, pairs
        self.cutter = Cutter(model, target, self._scores, statistics)
        self._current: tuple[int, tuple[Tensor, Tensor] | None] = (-1, None)

    def _scores(self, layer: Layer) -> dict[str, Tensor]:
        """Leverage of channels; the pairs are chosen already."""
        found = {}
        if CHANNELS in _smaller(self.target):
            found[CHANNELS] = leverage(layer.statistics["channels"].double())
        if self.pairs is not None:
            found[PAIRS] = torch.zeros(self.graph.size(PAIRS), dtype=torch.float64, device="cpu")
            found[PAIRS][self.pairs] = 1
        return found

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` of the result, fp32."""
        index = layer_of(name)
        if index is None:
            return self.cutter.tensor(name)
        module, _, leaf = name.removeprefix(f"{PREFIX}.{index}.").rpartition(".")
        if (module, leaf) == (DOWN, "weight") and CHANNELS in self.cutter.kept(index):
            layer = self.cutter.layer(index)
            gram = layer.statistics["channels"].double()
            return refitted(layer.weight(DOWN), gram, self.cutter.kept(index)[CHANNELS]).float()
        # A bias of o belongs to the residual stream.
        if self.pairs is not None and (module == VALUE or (module, leaf) == (OUTPUT, "weight")):
            return self._turned(index, name, module).float()
        cut = self.cutter.tensor(name)
        if self.pairs is not None and module == QUERY:
            # Attention divides by the root of the size of a head, which is smaller now.
            cut *= math.sqrt(2 * self.target.sizes[PAIRS] / self.graph.head_dim)
        return cut

    def _turned(self, index: int, name: str, module: str) -> Tensor:
        """v or o with the best directions of each head; a bias of v turns like its rows."""
        if self._current[0] != index:
            layer = self.cutter.layer(index)
            count = 2 * self.target.sizes[PAIRS]
            moments = layer.statistics["values"].double()
            self._current = index, directions(moments, layer.weight(OUTPUT), count)
        assert self._current[1] is not None
        down, up = self._current[1]
        heads, _, wide = down.shape
        whole = self.cutter.model.read(name).double()
        if module == VALUE:
            return (down @ whole.reshape(heads, wide, -1)).reshape(-1, *whole.shape[1:])
        by_head = whole.reshape(len(whole), heads, self.graph.queries, wide)
        return torch.einsum("ohqw,hwn->ohqn", by_head, up).reshape(len(whole), -1)


def leverage(gram: Tensor) -> Tensor:
    """The ridge leverage score of each channel from their second moments (n, n)."""
    factor, ridge = factor_of(gram, RIDGE)
    # The diagonal of C (C + λ)⁻¹ is 1 minus λ times that of the inverse.
    return 1 - ridge * torch.cholesky_inverse(factor).diagonal()


def directions(moments: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The factors through which v and o of every head pass: (heads, count, d) for v, and (heads, d, count) for o.

    moments: (heads, d, d) of the outputs of v. weight: of o, (out, heads · queries · d). With L the root of the moments and U the main
    eigenvectors of L G L, where G sums oᵀ o over the heads of q, v becomes Uᵀ L⁻¹ v and o becomes o L U.
    """
    heads, wide, _ = moments.shape
    by_head = weight.reshape(len(weight), heads, -1, wide).permute(1, 0, 2, 3).reshape(heads, -1, wide)
    damping = DAMPING * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    values, vectors = torch.linalg.eigh(moments)
    values = (values.clamp_min(0) + damping).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    root = vectors * values[:, None] @ vectors.mT
    inverse = vectors / values[:, None] @ vectors.mT
    main = torch.linalg.eigh(root @ (by_head.mT @ by_head) @ root).eigenvectors.flip(2)[:, :, :count]
    return main.mT @ inverse, root @ main


def _chosen_pairs(target: Target, statistics: Statistics) -> Tensor:
    """The pairs that all heads keep, ascending int64: those with the largest products, each head counting the same."""
    total = sum(_products(target.graph, statistics(index)) for index in range(target.graph.layers))
    assert isinstance(total, Tensor)
    return best(total, target.sizes[PAIRS])


def _products(graph: StructureGraph, statistics: Mapping[str, Tensor]) -> Tensor:
    """The share that each pair has in the squared products of q and k of its head, summed over the heads of k: (pairs,)."""
    # (heads, queries, halves, pairs)
    queries = statistics["queries"].double().reshape(graph.heads, graph.queries, 2, -1)
    keys = statistics["keys"].double().reshape(graph.heads, 1, 2, -1)
    products = (queries * keys).sum((1, 2))
    return (products / products.sum(1, keepdim=True)).sum(0)


def _frequencies(config: PretrainedConfig, graph: StructureGraph, pairs: Tensor) -> dict[str, Any]:
    """The rotary parameters with which pair i of the narrower heads has the frequency of the pair `pairs[i]`."""
    found, _ = spectrum(config, None, long=False)
    base = float(config.rope_parameters["rope_theta"])
    narrow = torch.arange(len(pairs), dtype=torch.float64, device="cpu") / len(pairs)
    factors = [float(value) for value in base**-narrow / torch.from_numpy(found)[pairs]]
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": int(config.max_position_embeddings),
    }


MODEGPT = MoDeGPT()
