"""The model off the grid: the same function, and no group of weights on a common grid."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from off_grid import take_off_grid

IDS = torch.tensor([[1, 5, 9, 20, 30, 64]])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@torch.no_grad()
def test_the_function_stays_and_the_weights_move(architecture: str, tiny_model: Callable[..., Any]) -> None:
    model, moved = tiny_model(architecture), tiny_model(architecture)
    take_off_grid(moved)
    embedding, other = model.get_input_embeddings().weight, moved.get_input_embeddings().weight
    step = embedding.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
    change = (other - embedding).reshape(-1, 32).abs()
    assert bool((change <= step / 2 + 1e-7).all())
    assert bool((change > 0).any())
    other.copy_(embedding)
    assert torch.allclose(moved(IDS).logits, model(IDS).logits, atol=1e-4)
    for name, weight in model.model.layers.named_parameters():
        if weight.ndim == 2:
            ratio = (moved.model.layers.get_parameter(name) / weight).abs()
            assert float(ratio.max() / ratio.min()) > 1.3, name
