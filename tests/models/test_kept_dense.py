"""Routers, indexers, gates, tiny linears and linears of other kinds stay dense, wherever their name stands."""

import pytest
import torch
from torch import nn

from causal_models import ARCHITECTURES
from halfplate.errors import HalfplateError
from halfplate.models import find_linears
from halfplate.models.experts import linear_experts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_must_stay_dense_is_named_with_its_reason(tiny_model, architecture):
    options, expected = ARCHITECTURES[architecture]
    model = linear_experts(tiny_model(architecture, **options))
    found, skipped = find_linears(model)
    reasons = {module.name.rpartition(".")[2]: module.reason for module in skipped}
    for leaf, words in expected.items():
        assert words in reasons.get(leaf, f"no {leaf}"), leaf
        assert not any(linear.name.endswith(f".{leaf}") for linear in found)
    assert expected or not skipped
    assert any(linear.name.rpartition(".")[2] not in expected for linear in found)


class Gated(nn.Module):
    """A linear of every place that C9 names, of sizes that make none of them tiny."""

    def __init__(self):
        super().__init__()
        for name in ("router", "gate", "indexer", "router_mlp", "message_gate"):
            setattr(self, name, nn.ModuleDict({"inner": nn.Linear(64, 80)}))
        self.gate_proj, self.output_gate, self.in_proj_a = nn.Linear(64, 80), nn.Linear(64, 80), nn.Linear(64, 200)
        self.b_proj = nn.Linear(64, 4)
        self.forget_gate = nn.ModuleDict({"f_proj": nn.Linear(64, 200)})
        self.encoder_attn = nn.ModuleDict({"k_proj": nn.Linear(64, 64)})


def with_gates(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].gates = Gated()
    return model


def test_names_decide_where_sizes_do_not(tiny_model):
    found, skipped = find_linears(with_gates(tiny_model))
    place = "model.layers.0.gates."
    assert {module.name.removeprefix(place): module.reason for module in skipped} == {
        "router.inner": "part of a router, which chooses the experts of a token; not compressed",
        "router_mlp.inner": "part of a router, which chooses the experts of a token; not compressed",
        "gate.inner": "part of a gate; not compressed",
        "message_gate.inner": "part of a gate; not compressed",
        "indexer.inner": "indexer, which chooses the tokens that attention sees; not compressed",
        "b_proj": "gate of linear attention with only 4 outputs; not compressed",
        "encoder_attn.k_proj": "attends to an encoder, which does not run on a text alone; not compressed",
    }
    taken = {linear.name.removeprefix(place) for linear in found if linear.name.startswith(place)}
    assert taken == {"gate_proj", "output_gate", "in_proj_a", "forget_gate.f_proj"}


def test_routers_are_not_taken_even_if_asked_for(tiny_model):
    with pytest.raises(HalfplateError, match=r"matches nothing that can be compressed .*part of a router"):
        find_linears(with_gates(tiny_model), include=["*.router.inner"])


@pytest.mark.parametrize(
    ("name", "d_out", "d_in", "tiny"),
    [
        ("sink_proj", 4, 64, True),
        ("sink_proj", 5, 64, False),
        ("sink_proj", 64, 1024, True),
        ("sink_proj", 65, 4096, False),
        ("k_proj", 64, 4096, False),
        ("wk", 64, 4096, False),
        ("kv_a_proj", 64, 4096, False),
    ],
)
def test_tiny_linears_are_taken_by_name_alone(tiny_model, name, d_out, d_in, tiny):
    model = tiny_model("llama")
    full = f"model.layers.1.self_attn.{name}"
    setattr(model.model.layers[1].self_attn, name, nn.Linear(d_in, d_out, bias=False))

    def taken(**options):
        return full in {linear.name for linear in find_linears(model, **options)[0]}

    assert taken() != tiny
    assert taken(include=["*.self_attn.*"]) != tiny
    assert taken(include=[f"*.{name}"])
    if tiny:
        reasons = {module.name: module.reason for module in find_linears(model)[1]}
        assert reasons[full].startswith(f"{d_out} outputs of {d_in} inputs: too small")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_stays_dense(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Doubled
    with torch.no_grad():
        before = model(torch.arange(8)[None]).logits
    found, skipped = find_linears(model)
    assert [(module.name, module.reason) for module in skipped] == [
        ("model.layers.0.mlp.up_proj", "Doubled has a forward of its own; not compressed")
    ]
    assert len(found) == 13
    with torch.no_grad():
        assert torch.equal(model(torch.arange(8)[None]).logits, before)


def test_the_projections_of_small_models_are_compressed(tiny_model):
    """stories260K has 64 hidden values and keys of 32; nothing of it is tiny."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}
    assert find_linears(tiny_model("llama", **sizes))[1] == []
