"""The weights of a model as structures for the native step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.kernels import native
from halfplate.kernels.linear import read_header, takes_bytes
from halfplate.runtime.architectures import Architecture, config_of, inner_of
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.runtime.calls import LEAST_PROMPT
from halfplate.runtime.structures import BlockStruct, DecoderStruct, ExpertStruct, MixtureStruct
from halfplate.runtime.traits import LayerTraits, Traits, norm_weights

NORMS = {"rms": 0, "rms+1": 0, "mean": 1, "mean+1": 1}  # halfplate::Norm
Pack = Callable[[Any], PackedLinear]


class NativeWeights:
    """The structures that hold the weights of a model; it keeps their tensors alive.

    pack: returns the linear in kernel layout for one of the model.
    """

    def __init__(self, model: Any, architecture: Architecture, traits: Traits, pack: Pack) -> None:
        self._architecture, self._traits, self._pack = architecture, traits, pack
        self._held: list[Any] = []
        self.multiplied = self.rounded = 0  # bytes of the linears of blocks, and of those that take a prompt as int8
        inner = inner_of(model)
        hidden = self.hidden = config_of(model).hidden_size
        self.blocks = (BlockStruct * len(inner.layers))()
        for block, layer, own in zip(self.blocks, inner.layers, traits.layers, strict=True):
            self._fill(block, layer, own)
        blocks = self.multiplied, self.rounded
        self.final_norm = self._norm(inner.get_submodule(architecture.final_norm), hidden)
        self.head, self.head_bytes = self._linear(model.lm_head)
        self.vocabulary = model.lm_head.out_features
        self.multiplied, self.rounded = blocks

    def _fill(self, block: BlockStruct, layer: Any, own: LayerTraits) -> None:
        architecture, traits = self._architecture, self._traits
        for place, name in enumerate(architecture.norms):
            if name is not None:
                block.norms[place], block.norm_bytes[place] = self._norm(layer.get_submodule(name), self.hidden)
        names = architecture.head_norms or ()
        for place, (name, heads) in enumerate(zip(names, (traits.heads, traits.kv_heads), strict=False)):
            count = traits.head_dim * (heads if architecture.whole_norms else 1)
            address, block.norm_bytes[4 + place] = self._norm(layer.get_submodule(name), count)
            setattr(block, ("query_norm", "key_norm")[place], address)
        for field, name in zip("qkv", architecture.qkv, strict=False):
            address, block.linear_bytes["qkv".index(field)] = self._linear(layer.get_submodule(name))
            setattr(block, field, address)
        block.o, block.linear_bytes[3] = self._linear(layer.get_submodule(architecture.out))
        if own.mixture is None:
            block.mlp, block.intermediate = self._expert([layer.get_submodule(name) for name in architecture.mlp])
        else:
            block.mixture, block.intermediate = self._mixture(layer, own)
        if architecture.sinks is not None:
            path, _, name = architecture.sinks.rpartition(".")
            sinks = getattr(layer.get_submodule(path), name).detach().float().contiguous()
            block.sinks, block.sink_bytes = self._place(sinks, torch.float32, "the sinks")
        block.window, block.rotary = own.window, -1 if own.table is None else own.table

    def _mixture(self, layer: Any, own: LayerTraits) -> tuple[MixtureStruct, int]:
        """The experts of a layer, and the number of intermediates of each."""
        routing = self._architecture.mixture
        assert own.mixture is not None
        assert routing is not None
        module = layer.get_submodule(routing.module)
        experts = (ExpertStruct * own.mixture.experts)()
        for number, expert in enumerate(module.experts.experts):
            linears = [getattr(expert, leaf) for leaf in module.experts.layout.linears]
            experts[number], intermediate = self._expert(linears)
        self._held.append(experts)
        address, size = self._router(getattr(module, routing.router))
        numbers = (*("experts", "chosen", "normalised", "logistic", "groups", "chosen_groups"), "scale", "least_sum")
        struct = MixtureStruct(
            **{name: getattr(own.mixture, name) for name in numbers},
            router=address,
            expert=experts,
            router_bytes=size,
            expert_bytes=ctypes.sizeof(experts),
        )
        if routing.correction is not None:
            path, _, name = routing.correction.rpartition(".")
            correction = getattr(module.get_submodule(path), name).detach().float().reshape(-1).contiguous()
            struct.correction, struct.correction_bytes = self._place(correction, torch.float32, "the correction")
        if own.mixture.shared:
            shared = [layer.get_submodule(name) for name in routing.shared]
            struct.shared, struct.shared_intermediate = self._expert(shared)
            if routing.shared_gate is not None:
                struct.shared_gate, struct.shared_gate_bytes = self._router(layer.get_submodule(routing.shared_gate))
        return struct, intermediate

    def _router(self, module: Any) -> tuple[int, int]:
        """A small linear that may not be in kernel layout, because it is not compressed and its module has other outputs."""
        if isinstance(module, PackedLinear):
            return self._linear(module)
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        router = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
        router.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            router.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return self._place(PackedLinear.of_dense(router).packed, torch.uint8, "the router")

    def _expert(self, linears: list[Any]) -> tuple[ExpertStruct, int]:
        """The linears of an MLP, those before the activation first, and the number of its intermediates."""
        struct = ExpertStruct()
        places = (0, 1, 2) if len(linears) == 3 else (0, 2)
        for place, linear in zip(places, linears, strict=True):
            address, struct.bytes[place] = self._linear(linear)
            setattr(struct, ("gate", "up", "down")[place], address)
        return struct, linears[-1].in_features

    def _linear(self, module: Any) -> tuple[int, int]:
        packed = self._pack(module).packed
        self.multiplied += packed.nbytes
        self.rounded += packed.nbytes * takes_bytes(read_header(packed), LEAST_PROMPT)
        return self._place(packed, torch.uint8, "a linear")

    def _norm(self, module: Any, count: int) -> tuple[int, int]:
        return self._place(norm_weights(module, self._traits.norm, count), torch.float32, "the weight of a norm")

    def _place(self, tensor: Tensor, dtype: torch.dtype, name: str) -> tuple[int, int]:
        """The address and the size in bytes of a tensor, which is kept alive."""
        self._held.append(tensor)
        return native.address(tensor, dtype, name), tensor.nbytes


def structure_of(weights: NativeWeights, architecture: Architecture, traits: Traits) -> DecoderStruct:
    """The structure of one sequence; that of the cache, the tables and the scratch is filled in later."""
    numbers = [*("heads", "kv_heads", "head_dim", "rotary_dim", "activation", "epsilon", "embedding_scale")]
    numbers += ["gate_alpha", "gate_limit", "attention_scale", "residual_scale", "logit_scale"]
    numbers += ["attention_cap", "logit_cap"]
    return DecoderStruct(
        **{name: getattr(traits, name) for name in numbers},
        hidden=weights.hidden,
        vocabulary=weights.vocabulary,
        blocks=len(weights.blocks),
        rotary_pairs=architecture.rotation != "halves",
        tables=len(traits.tables),
        norm=NORMS[traits.norm],
        gated=architecture.gated,
        parallel=architecture.parallel,
        whole_norms=architecture.whole_norms,
        late_norms=architecture.late_norms,
        final_norm=weights.final_norm[0],
        final_norm_bytes=weights.final_norm[1],
        head=weights.head,
        head_bytes=weights.head_bytes,
        block=weights.blocks,
        block_bytes=ctypes.sizeof(weights.blocks),
        sequences=1,
    )
