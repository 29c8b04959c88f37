"""Sampling with the native step, against the forward of the model itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from causal_models import MOE
from halfplate.calibration.decoding import OwnDecoding, decoding_of
from halfplate.calibration.self_text import Start, draw, draw_by_torch, sample_text
from halfplate.calibration.text import calibration_tokens
from halfplate.errors import HalfplateError
from halfplate.kernels import native
from halfplate.models.experts import linear_experts
from halfplate.runtime import accelerate
from halfplate.runtime.sampling import native_sampling

natively = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
FAMILIES = {
    "llama": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    "qwen3": {"use_sliding_window": False, "layer_types": None},
    "gemma3_text": {},
    "phi3": {},
    "qwen3_moe": MOE | {"head_dim": 8},
}


@natively
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_the_native_step_samples_the_same_text(tiny_model: Any, architecture: str, packed: bool) -> None:
    model = linear_experts(tiny_model(architecture, **FAMILIES[architecture]))
    expected = sample_text(model, Start("bos", 1), samples=20, seq_len=24, seed=0)
    if packed:
        accelerate(model)
    decoding = decoding_of(model, 24, native_sampling)
    assert decoding.path == f"native {native.isa()} step, cache in fp32"
    assert torch.equal(sample_text(model, Start("bos", 1), 20, 24, seed=0, decoding=decoding), expected)


@natively
@torch.no_grad()
def test_a_model_in_bf16_keeps_its_cache_in_bf16(tiny_model: Any) -> None:
    model = tiny_model("llama", head_dim=16)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    decoding = decoding_of(model, 16, native_sampling)
    assert decoding.path.endswith("cache in bf16")
    first, second = (sample_text(model, Start("bos", 1), 5, 16, seed=0, decoding=decoding) for _ in range(2))
    assert torch.equal(first, second)


@torch.no_grad()
def test_a_decoding_with_other_logits_is_not_used(tiny_model: Any) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)

    def wrong(_: Any, seq_len: int) -> OwnDecoding:
        return OwnDecoding(other, seq_len, "other model")

    decoding = decoding_of(model, 8, wrong)
    assert decoding.path.startswith("transformers: the logits of the other model differ by ")
    expected = sample_text(model, Start("bos", 1), 2, 8, seed=0)
    assert torch.equal(sample_text(model, Start("bos", 1), 2, 8, seed=0, decoding=decoding), expected)


@torch.no_grad()
def test_other_architectures_say_why(tiny_model: Any) -> None:
    reason = "OPTForCausalLM has no native step" if native.available() else native.reason()
    assert decoding_of(tiny_model("opt"), 8, native_sampling).path.startswith(f"transformers: {reason}")


def test_the_protocol_names_the_path(tiny_model: Any) -> None:
    model, tokenizer = tiny_model("llama"), SimpleNamespace(bos_token_id=1)
    ordinary = calibration_tokens("self", model, tokenizer, 2, 8, seed=0)  # type: ignore[arg-type]
    assert ordinary.protocol()["decoded_by"] == "transformers"
    if native.available():
        fast = calibration_tokens("self", model, tokenizer, 2, 8, seed=0, maker=native_sampling)  # type: ignore[arg-type]
        assert fast.protocol()["decoded_by"] == f"native {native.isa()} step, cache in fp32"
        assert fast.protocol()["sha256"] == ordinary.protocol()["sha256"]


@pytest.mark.parametrize("vocabulary", [1, 7, 128, 5000, 70_000])
def test_draws_are_those_of_the_cumulative_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, vocabulary, generator=generator)
    logits[:, ::3] = -torch.inf
    logits[:, vocabulary // 2] = 1.0
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    for temperature in (1.0, 0.7):
        found, expected = (f(logits, temperature, uniform) for f in (draw, draw_by_torch))
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        assert logits.gather(1, found[:, None]).isfinite().all()
        # Rounding may move a draw to a neighbour of the same cumulative sum only.
        at = cumulative.gather(1, torch.stack([found, expected], 1))
        torch.testing.assert_close(at[:, 0], at[:, 1], rtol=0, atol=1e-4)
        assert (found == expected).float().mean() > 0.9


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(wrong: float) -> None:
    logits = torch.zeros(3, 100)
    logits[1, 99] = wrong
    with pytest.raises(HalfplateError, match="not finite"):
        draw(logits, 1.0, torch.full((3,), 0.5, dtype=torch.float64))
    with pytest.raises(HalfplateError, match="not finite"):
        draw(torch.full((1, 20), -torch.inf), 1.0, torch.full((1,), 0.5, dtype=torch.float64))
