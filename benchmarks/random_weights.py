"""Weights that are random and models made of them: speed does not depend on what weights say.

The Llama shape is that of 1.1B models: hidden 2048, ffn 5632, 22 blocks, 32 heads, 4 kv heads of 64, vocabulary 32,000.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.models.linears import find_linears, replace_module
from halfplate.pattern import Pattern

TWO_OF_FOUR = Pattern(2, 4)
# What ggml calls the linears of a block.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensors(spec: WeightSpec) -> dict[str, Tensor]:
    """What a compressed matrix of `spec`, 2:4 or dense, stores: values of about 0.02, wrappers near the identity."""
    pairs = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8)  # positions that rise
    tensors = {}
    for name, (shape, dtype) in spec.layout().items():
        if name == "weight_index":
            low, high = (pairs[torch.randint(6, shape)] for _ in range(2))
            tensors[name] = low | high << 4
        elif name == "weight_scales":
            tensors[name] = torch.full(shape, 0.02 / (40 if spec.core_dtype == "int8" else 4), dtype=dtype)
        elif name.endswith("_scales"):
            tensors[name] = torch.full(shape, 1 / 127, dtype=dtype)
        elif name == "weight" and dtype == torch.uint8:
            tensors[name] = _codes(shape, spec.core_dtype)
        elif name == "weight":
            tensors[name] = (0.02 * torch.randn(shape)).to(dtype)
        else:
            near = torch.eye(shape[-1]).expand(shape) + 0.02 * torch.randn(shape)
            tensors[name] = (
                near.to(dtype) if dtype.is_floating_point else (near * 100).round().clamp(-127, 127).to(dtype)
            )
    return tensors


def _codes(shape: tuple[int, ...], core_dtype: str) -> Tensor:
    """Bytes of codes: one of int8, from 1 to 255, or two of int4, each from 1 to 15; 0 stands for no weight."""
    if core_dtype == "int8":
        return torch.randint(1, 256, shape, dtype=torch.uint8)
    low, high = (torch.randint(1, 16, shape, dtype=torch.uint8) for _ in range(2))
    return low | high << 4


def llama_config(blocks: int = 22) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def dense_llama(dtype: torch.dtype, blocks: int = 22) -> Any:
    """The dense model, every tensor with memory of its own; alike matrices hold the same numbers, which are quick to make."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(llama_config(blocks), dtype=dtype)
    made: dict[tuple[int, ...], Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = tuple(parameter.shape)
            if shape not in made:
                made[shape] = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
            module.register_parameter(name, nn.Parameter(made[shape].to(dtype, copy=True), requires_grad=False))
    # Buffers are no weights: those of the rotary embedding are computed from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


def compressed_llama(dense: Any, core_dtype: str, wrapper_dtype: str, block_size: int = 128) -> Any:
    """The same shape with ARMOR linears; shares embedding, norms and head with `dense`, which stays as it is."""
    shared = {id(tensor): tensor for tensor in [*dense.parameters(), *dense.buffers()]}
    model = copy.deepcopy(dense, shared)
    linears, _ = find_linears(model)
    made: dict[WeightSpec, dict[str, Tensor]] = {}
    for linear in linears:
        spec = WeightSpec(linear.d_out, linear.d_in, TWO_OF_FOUR, core_dtype, block_size, block_size, wrapper_dtype)
        if spec not in made:
            made[spec] = random_tensors(spec)
        module = CompressedLinear(spec, False, device="meta")
        module.load_state_dict({name: tensor.clone() for name, tensor in made[spec].items()}, assign=True)
        replace_module(model, linear.name, module.requires_grad_(False))
    return model


def write_gguf(path: Path, kind: str, blocks: int = 22) -> None:
    """The dense shape as a GGUF file whose matrices, embedding and head included, are all of `kind` (Q8_0 or Q4_0)."""
    import gguf

    quantised = gguf.GGMLQuantizationType[kind]
    config = llama_config(blocks)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")  # tokens are numbers here
    made: dict[tuple[int, int], Any] = {}

    def add(name: str, d_out: int, d_in: int) -> None:
        if (d_out, d_in) not in made:
            weight = np.random.default_rng(0).standard_normal((d_out, d_in), dtype=np.float32)
            made[d_out, d_in] = gguf.quants.quantize(0.02 * weight, quantised)
        writer.add_tensor(name, made[d_out, d_in], raw_dtype=quantised)

    ones = np.ones(config.hidden_size, np.float32)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    add("token_embd.weight", config.vocab_size, config.hidden_size)
    for linear in find_linears(skeleton)[0]:
        inner = linear.name.split(f"layers.{linear.block}.")[1]
        add(f"blk.{linear.block}.{GGUF_NAMES[inner]}.weight", linear.d_out, linear.d_in)
    for block in range(blocks):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{block}.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    add("output.weight", config.vocab_size, config.hidden_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
