"""Structured pruning by second moments (Týr-the-Pruner), by gradients (NIRVANA) and by values (CFSP), against loops and autograd."""

import pytest
import torch

from halfplate.models.sources import load_dense
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.structure.least_squares import refitted, surgeon
from halfplate.transforms.structure.tyr import damped
from structured_models import hidden_states, kept_by_hand, pruned, saved, tokens


def removed_by_hand(x, weight, width, count, rounds):
    """Units that stay: each time those whose removal, with a least-squares refit of the rest, changes the outputs least."""
    outputs = x @ weight.T

    def loss(units):
        inputs = [unit * width + at for unit in units for at in range(width)]
        fitted = torch.linalg.lstsq(x[:, inputs], outputs).solution
        return float((outputs - x[:, inputs] @ fitted).square().sum())

    left = list(range(weight.shape[1] // width))
    removed = len(left) - count
    for number in range(rounds):
        going = removed * (number + 1) // rounds - removed * number // rounds
        harms = {unit: loss([other for other in left if other != unit]) for unit in left}
        left = [unit for unit in left if unit not in sorted(left, key=harms.get)[:going]]
    return left


@pytest.mark.parametrize(("width", "count", "rounds"), [(1, 5, 7), (1, 4, 3), (3, 2, 2), (4, 1, 2)])
def test_the_surgeon_removes_what_a_refit_replaces_best(width, count, rounds):
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    x = torch.randn(300, 12, dtype=torch.float64, generator=generator) @ mixing
    weight = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    found = surgeon(weight, x.T @ x, width, count, rounds).tolist()
    assert found == removed_by_hand(x, weight, width, count, rounds)


def test_tyr_refits_what_reads_the_rest(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "tyr", 0.6)
    assert (result.config.num_key_value_heads, result.config.num_attention_heads) == (2, 4)
    found, (model, inputs) = StreamedModel(result), hidden_states(source)
    for module, width, rounds in (("mlp.down_proj", 1, 16), ("self_attn.o_proj", 32, 2)):
        name = f"model.layers.1.{module}"
        x, weight = inputs[name][0], model.get_submodule(name).weight.double()
        gram = damped(x.T @ x / len(x))
        kept = surgeon(weight, gram, width, found.shape(f"{name}.weight")[1] // width, rounds)
        columns = (kept[:, None] * width + torch.arange(width)).flatten()
        expected = refitted(weight, gram, columns)
        torch.testing.assert_close(found.read(f"{name}.weight").double(), expected, rtol=1e-3, atol=1e-4)
        if width == 1:
            gate = model.get_submodule("model.layers.1.mlp.gate_proj").weight[kept]
            torch.testing.assert_close(found.read("model.layers.1.mlp.gate_proj.weight"), gate, rtol=0, atol=0)


def test_cfsp_keeps_the_largest_values_and_all_heads(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "cfsp", 0.75)
    assert result.config.num_key_value_heads == 4
    found, (model, inputs) = StreamedModel(result), hidden_states(source)
    values = inputs["model.layers.2.mlp.down_proj"][0].square().sum(0).tolist()
    kept = kept_by_hand(values, result.config.intermediate_size)
    expected = model.model.layers[2].mlp.up_proj.weight[kept]
    torch.testing.assert_close(found.read("model.layers.2.mlp.up_proj.weight"), expected, rtol=0, atol=0)


def test_nirvana_keeps_what_the_logits_depend_on(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "nirvana", 0.6)
    model, ids = load_dense(source).model.requires_grad_(True), tokens(source).ids
    logits_of = model(ids, use_cache=False).logits
    sum(logits_of[sample].max(0).values.mean() for sample in range(len(ids))).backward()
    found = StreamedModel(result)
    for index, block in enumerate(model.model.layers):
        moved = {
            name: (p.grad * p.detach()).abs() for name, p in block.named_parameters() if name.endswith("proj.weight")
        }
        attention = {name: moved[f"self_attn.{name}_proj.weight"] for name in "qkvo"}
        heads = []
        for head in range(4):
            wide, narrow = slice(32 * head, 32 * (head + 1)), slice(16 * head, 16 * (head + 1))
            parts = (attention["q"][wide], attention["k"][narrow], attention["v"][narrow], attention["o"][:, wide])
            heads.append(sum(float(part.sum()) for part in parts))
        down = moved["mlp.down_proj.weight"].T
        channels = [
            float(moved["mlp.gate_proj.weight"][at].sum() + moved["mlp.up_proj.weight"][at].sum() + down[at].sum())
            for at in range(128)
        ]
        of_heads = kept_by_hand(heads, result.config.num_key_value_heads)
        of_channels = kept_by_hand(channels, result.config.intermediate_size)
        for inner, expected in cut_by_hand_weights(model, index, of_heads, of_channels).items():
            torch.testing.assert_close(found.read(f"model.layers.{index}.{inner}"), expected, rtol=0, atol=0)


def cut_by_hand_weights(model, layer, heads, channels):
    """`cut_by_hand` of a model without biases."""
    block = model.model.layers[layer]
    of_k = [16 * head + at for head in heads for at in range(16)]
    return {
        "self_attn.k_proj.weight": block.self_attn.k_proj.weight.detach()[of_k],
        "mlp.gate_proj.weight": block.mlp.gate_proj.weight.detach()[channels],
        "mlp.down_proj.weight": block.mlp.down_proj.weight.detach()[:, channels],
    }
