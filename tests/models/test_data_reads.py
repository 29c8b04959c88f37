"""Linears whose weight is read by the code around them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from halfplate.models import find_linears
from halfplate.models.data_reads import data_reads, stated_reads

UP = "model.layers.1.mlp.up_proj"


class Asking(LlamaMLP):
    """Casts to the type of a weight, as the indexers of DeepSeek do."""

    def forward(self, x):
        return super().forward(x.to(self.up_proj.weight.dtype))


class Aliasing(LlamaMLP):
    """Reaches the weight by another name."""

    def forward(self, x):
        projection = self.up_proj
        hidden = self.act_fn(self.gate_proj(x)) * functional.linear(x, projection.weight, projection.bias)
        return self.down_proj(hidden)


class Elsewhere(LlamaMLP):
    """Reads it in a method that runs on other machines."""

    def fused(self, x):
        return functional.linear(x, self.up_proj.weight)


class Training(LlamaMLP):
    """Reads it in training alone."""

    def forward(self, x):
        if self.training and x.requires_grad:
            x = x + self.up_proj.weight.mean()
        return super().forward(x)


class Branching(LlamaMLP):
    """Reads it where an option says so."""

    slow = False

    def forward(self, x):
        if self.slow:
            x = x + self.up_proj.weight.mean()
        return super().forward(x)


class Failing(Branching):
    """Cannot run without numbers."""

    def forward(self, x):
        return super().forward(x if x.sum().item() else -x)


def with_mlp(tiny_model, kind, **attributes):
    model = tiny_model("llama")
    model.model.layers[1].mlp.__class__ = kind
    vars(model.model.layers[1].mlp).update(attributes)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        (Asking, {}, "by Asking.forward"),
        (Aliasing, {}, "by the code of the model"),
        (Elsewhere, {}, "by Elsewhere.fused"),
        (Training, {}, None),
        (Branching, {}, None),
        (Branching, {"slow": True}, "by Branching.forward"),
        (LlamaMLP, {}, None),
    ],
)
def test_reads_are_found_and_named(tiny_model, kind, attributes, reason, device):
    model = with_mlp(tiny_model, kind, **attributes).to(device)
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    reads, failure = data_reads(model, "model.layers")
    assert failure is None
    assert reads == ({} if reason is None else {UP: f"its weight is read as data {reason}; not compressed"})
    assert before == {name: (type(module), vars(module)) for name, module in model.named_modules()}
    found, skipped = find_linears(model)
    assert {module.name: module.reason for module in skipped} == reads
    assert len(found) == 14 - len(reads)


def test_where_the_model_does_not_run_its_source_decides(tiny_model):
    reads, failure = data_reads(with_mlp(tiny_model, Failing), "model.layers")
    assert reads.keys() == {UP}
    assert "DataDependent" in failure or "item" in failure


def test_what_the_source_says(tiny_model):
    kinds = {Asking: True, Aliasing: False, Elsewhere: True, Training: False, Branching: True, LlamaMLP: False}
    for kind, stated in kinds.items():
        assert (UP in stated_reads(with_mlp(tiny_model, kind))) == stated, kind.__name__


def test_bloom_reads_its_weights_under_slow_but_exact(tiny_model):
    assert find_linears(tiny_model("bloom"))[1] == []
    exact = tiny_model("bloom", pretraining_tp=2, slow_but_exact=True)
    reads = data_reads(exact, "transformer.h")[0]
    assert {name.rpartition(".")[2] for name in reads} == {"dense", "dense_4h_to_h"}


def test_a_layer_of_the_usual_kind_costs_no_run(tiny_model, monkeypatch):
    model = copy.deepcopy(tiny_model("llama"))
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    assert data_reads(model, "model.layers") == ({}, None)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert torch.is_grad_enabled()
