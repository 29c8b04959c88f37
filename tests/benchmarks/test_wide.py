"""The model of multiples of 256: the same function, and every added input is zero."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from wide import narrowed, widened

IDS = torch.tensor([[1, 5, 9, 20, 30, 64]])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_function_stays_and_added_inputs_are_zero(architecture: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(architecture)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
    multiple = 48  # divides no width of the tiny model
    wide = widened(model, multiple)
    logits = model(IDS).logits
    assert torch.allclose(wide(IDS).logits, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    narrow = dict(model.named_modules())
    seen = []

    def look(name: str, inputs: torch.Tensor) -> None:
        assert inputs.shape[-1] % multiple == 0, name
        assert not inputs[..., narrow[name].in_features :].any(), name
        seen.append(name)

    for name, module in wide.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
    wide(IDS)
    assert len(seen) == 1 + 7 * model.config.num_hidden_layers

    first = wide.model.layers[0].mlp.gate_proj.weight
    first[:, model.config.hidden_size :] = 1  # what has no effect may change
    assert torch.allclose(
        narrowed(wide, model.config)(IDS).logits, logits, rtol=0, atol=1e-5 * float(logits.abs().max())
    )
    wide.model.layers[0].self_attn.o_proj.weight[-1, 0] = 1
    with pytest.raises(ValueError, match=r"o_proj\.weight is not zero outside of"):
        narrowed(wide, model.config)
