"""Make a model of the same function whose widths are multiples of 256, which llama.cpp's K- and IQ-types want.

    python benchmarks/wide.py OUT [--model MODEL]

The residual stream of SmolLM2 has 576 channels. They become 768, of which the last 192 are always zero: every weight stands in a larger matrix of
zeros, in its upper left corner. RMSNorm divides by the root of a mean, so its weights are multiplied by sqrt(576/768) and its epsilon by
576/768. The nine heads become twelve, by one head of k and v, with its three query heads, that are zero as well. So every input of the added columns
is exactly zero, and neither a quantised file of llama.cpp nor one of ours gains or loses by them, except in bytes, by the same share.

Two other ways would not be fair. A copy of a head, with half of its columns of o each, gives a solver that knows the inputs two codes for one
weight. A fourth query head beside the three of each head of k and v has zeros in o for inputs that are not zero, and IQ3_XXS has no zero.
OUT is in fp32, because sqrt(3/4) times a weight in bf16 is not a number in bf16; it is its own reference.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from common import CACHE
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.write import write_model
from halfplate.models.sources import load_dense

WIDTH = 256  # values of a block of K- and IQ-types


def widened_config(config: PretrainedConfig, width: int = WIDTH) -> PretrainedConfig:
    """The configuration with hidden size, inner size and inputs of o raised to multiples of `width`."""
    wide = copy.deepcopy(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    heads = config.num_key_value_heads
    while heads * shared * head_dim % width:
        heads += 1
    wide.hidden_size, wide.intermediate_size = (
        _above(config.hidden_size, width),
        _above(config.intermediate_size, width),
    )
    wide.head_dim, wide.num_key_value_heads, wide.num_attention_heads = head_dim, heads, heads * shared
    wide.rms_norm_eps = config.rms_norm_eps * config.hidden_size / wide.hidden_size
    return wide


@torch.no_grad()
def widened(model: PreTrainedModel, width: int = WIDTH) -> PreTrainedModel:
    """A model in fp32 of the same function as `model`, a causal model with Llama's modules, with the widths of `widened_config`."""
    config = widened_config(model.config, width)
    wide: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    share = math.sqrt(model.config.hidden_size / config.hidden_size)
    weights = dict(model.named_parameters())
    for name, parameter in wide.named_parameters():
        of_stream = name.endswith("norm.weight") and parameter.shape == (config.hidden_size,)
        parameter.copy_(_cornered(weights[name].double() * (share if of_stream else 1.0), parameter.shape))
    return wide.eval()


@torch.no_grad()
def narrowed(wide: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """The model of `config`, that `wide` was made from, with the corners of the weights of `wide`, which may have changed since; in fp32.

    Raises ValueError if the functions of the two may differ: an added row of a weight or column of the embedding is not zero. Added columns
    of linears may hold anything, because their inputs are zero.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    share = math.sqrt(config.hidden_size / wide.config.hidden_size)
    weights = dict(wide.named_parameters())
    table = weights[
        next(name for name, parameter in model.named_parameters() if parameter is model.get_input_embeddings().weight)
    ]
    for name, parameter in model.named_parameters():
        weight = weights[name].float()
        if weight[len(parameter) :].any() or (weights[name] is table and weight[:, parameter.shape[1] :].any()):
            raise ValueError(f"{name} is not zero outside of {tuple(parameter.shape)}")
        of_stream = name.endswith("norm.weight") and weight.shape != parameter.shape
        corner = weight[tuple(slice(size) for size in parameter.shape)]
        parameter.copy_(corner.double() / (share if of_stream else 1.0))
    return model.eval()


def make_wide(model: str, out: Path) -> None:
    """Write `model`, changed by `widened`, to the folder `out`."""
    loaded = load_dense(model)
    with new_folder(out, overwrite=False) as folder:
        write_model(widened(loaded.model), loaded.tokenizer, folder, torch.float32, quantization=None)


def _above(count: int, width: int) -> int:
    return -(-count // width) * width


def _cornered(weight: Tensor, shape: torch.Size) -> Tensor:
    """Zeros of `shape` with `weight` in the first places of each dimension."""
    whole = torch.zeros(shape, dtype=weight.dtype)
    whole[tuple(slice(size) for size in weight.shape)] = weight
    return whole


def main() -> None:
    """Make the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--model", default=str(CACHE / "off_grid"), help="the model to start from (benchmarks/off_grid.py)"
    )
    arguments = parser.parse_args()
    make_wide(arguments.model, arguments.out)
    print(f"{arguments.out}: widths that are multiples of {WIDTH}")


if __name__ == "__main__":
    main()
