"""What a model holds and calls, found without values: experts of every kind, caches of every kind, nothing printed."""

import pytest
import torch
from transformers import DynamicCache

from halfplate.calibration.cache import _held, cache_nbytes
from halfplate.calibration.self_text import token_nbytes
from halfplate.models.arguments import cache_argument
from halfplate.models.without_values import run_without_values
from halfplate.planning import make_plan
from halfplate.recipe import Recipe

KINDS = {
    "llama": {},
    "gemma3_text": {},
    "gemma4_text": {},
    "mamba": {"state_size": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_cache_is_measured_as_it_is_filled(tiny_model, kind):
    model = tiny_model(kind, **KINDS[kind])
    argument = cache_argument(model.forward)
    cache = DynamicCache(config=model.config)
    output = model(torch.zeros(1, 20, dtype=torch.int64), use_cache=True, **{argument: cache})
    held = _held(getattr(output, argument), set())
    assert cache_nbytes(model.config, 20) == held > 0
    assert token_nbytes(model.config, 20) == -(-held // 20)


def test_where_it_cannot_be_measured_plain_attention_is_reckoned(tiny_model, monkeypatch):
    config = tiny_model("llama").config
    monkeypatch.setattr("halfplate.calibration.cache.cache_nbytes", lambda *_: 1 / 0)
    assert token_nbytes(config, 20) == 2 * 2 * 2 * 8 * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma4_text", "mamba", "qwen3_moe"])
def test_a_plan_prints_no_traceback(tiny_model, tmp_path, kind, capfd, caplog):
    tiny_model(kind, **KINDS[kind]).save_pretrained(tmp_path / "model")
    plan = make_plan(str(tmp_path / "model"), Recipe(samples=4, seq_len=16))
    assert plan.sizes.cache_nbytes > 0
    if kind == "qwen3_moe":
        # The two that read one input share it, which only a run without values shows.
        assert len(plan.sizes.stages) < len({m.name.rpartition(".")[2] for m in plan.matrices if not m.skipped})
    heard = capfd.readouterr()
    assert "Traceback" not in heard.out + heard.err + caplog.text


def test_the_way_of_experts_is_given_back(tiny_model):
    model = tiny_model("qwen3_moe", **KINDS["qwen3_moe"])
    before = model.config._experts_implementation
    with run_without_values(model):
        assert model.config._experts_implementation == "batched_mm"
    assert model.config._experts_implementation == before
