"""Text that a model samples from itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from halfplate.calibration import self_text
from halfplate.calibration.cache import PreallocatedLayer, preallocated_cache
from halfplate.calibration.self_text import Start, find_start, sample_text
from halfplate.errors import HalfplateError

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3"]


def sample_naively(model: Any, start: int, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """One sequence and one whole forward at a time; ends are not treated."""
    chances = torch.rand(samples, seq_len, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = []
    for row in range(samples):
        ids = [start]
        for position in range(1, seq_len):
            probabilities = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(-1)
            token, below = 0, probabilities[0]
            while below <= chances[row, position]:
                token += 1
                below = below + probabilities[token]
            ids.append(token)
        rows.append(ids)
    return torch.tensor(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_sampling_equals_one_sequence_at_a_time(tiny_model: Any, architecture: str) -> None:
    model = tiny_model(architecture)
    ids = sample_text(model, Start("bos", 1), samples=3, seq_len=12, seed=0)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, sample_naively(model, 1, 3, 12, seed=0))


def test_the_batch_does_not_change_the_text(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = sample_text(model, Start("bos", 1), samples=7, seq_len=10, seed=0)
    monkeypatch.setattr(self_text, "MAX_BATCH", 3)
    assert torch.equal(whole, sample_text(model, Start("bos", 1), samples=7, seq_len=10, seed=0))


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_seed_alone_decides(tiny_model: Any) -> None:
    model, start = tiny_model("llama"), Start("bos", 1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample_text(model, start, 4, 16, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, sample_text(model, start, 4, 16, seed=0))
    assert not torch.equal(first, sample_text(model, start, 4, 16, seed=1))
    assert not first.is_inference()


def test_tokens_come_with_the_models_probabilities(tiny_model: Any) -> None:
    model = tiny_model("llama", vocab_size=16)
    drawn = sample_text(model, Start("bos", 1), samples=4000, seq_len=2, seed=0)[:, 1]
    expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    share = drawn.bincount(minlength=16) / len(drawn)
    # Four standard deviations of a share of 4,000 draws.
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_low_temperature_is_greedy(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = sample_text(model, Start("bos", 1), 2, 10, seed=0, temperature=1e-4)
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0, 1:], model(ids[:1]).logits[0, :-1].argmax(-1))


def test_text_goes_on_after_an_end(tiny_model: Any) -> None:
    model = tiny_model("llama", eos_token_id=list(range(2, 60)))
    assert torch.equal(
        sample_text(model, Start("bos", 1), 8, 30, 0), sample_text(tiny_model(), Start("bos", 1), 8, 30, 0)
    )


def test_uniform_starts_differ(tiny_model: Any) -> None:
    ids = sample_text(tiny_model("llama"), Start("uniform", None), samples=64, seq_len=2, seed=0)
    assert len(ids[:, 0].unique()) > 32
    assert ids.min() >= 0
    assert ids.max() < 128


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (1, 2, Start("bos", 1)),
        (None, 2, Start("eos", 2)),
        (None, [3, 2], Start("eos", 3)),
        (5, 5, Start("bos", 5)),
        (None, None, Start("uniform", None)),
        (4000, None, Start("uniform", None)),
    ],
)
def test_the_start_token_is_found(tiny_model: Any, bos: int | None, eos: Any, expected: Start) -> None:
    model = tiny_model("llama", bos_token_id=bos, eos_token_id=eos)
    nothing = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    assert find_start(model, nothing) == expected  # type: ignore[arg-type]


def test_the_tokenizer_comes_first(tiny_model: Any) -> None:
    model = tiny_model("llama", bos_token_id=7, eos_token_id=[8, 9])
    assert find_start(model, SimpleNamespace(bos_token_id=None, eos_token_id=2)) == Start("bos", 7)  # type: ignore[arg-type]
    assert find_start(model, SimpleNamespace(bos_token_id=1, eos_token_id=2)) == Start("bos", 1)  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(HalfplateError, match="not finite"):
        sample_text(model, Start("bos", 1), 2, 4, seed=0)


def test_memory_bounds_the_batch(tiny_model: Any) -> None:
    # 2 blocks of keys and values of 2 heads of 8 in fp32: 256 bytes a token.
    each_token = self_text.token_nbytes(tiny_model("llama").config, 10)
    assert each_token == 256
    assert self_text.sequences_at_once(each_token, 10, 256 * 10 * 5) == 5
    assert self_text.sequences_at_once(each_token, 10_000, 256 * 10 * 5) == 1


def test_the_cache_gives_views_of_one_room(tiny_model: Any) -> None:
    config = tiny_model("gemma3_text").config
    cache = preallocated_cache(config, 4)
    assert [type(layer) is PreallocatedLayer for layer in cache.layers] == [False, True, False]
    layer = cache.layers[1]
    states = torch.randn(4, 2, 3, 1, 8)
    for count, state in enumerate(states, start=1):
        keys, values = layer.update(state, -state)
        assert torch.equal(keys, torch.cat(tuple(states[:count]), dim=-2))
        assert torch.equal(values, -keys)
        assert layer.get_seq_length() == count
        assert keys.data_ptr() == layer.key_room.data_ptr()
    # Nothing of transformers itself is replaced.
    assert type(DynamicCache(config=config).layers[1]) is DynamicLayer


@pytest.mark.slow
def test_a_real_model_writes_stories(stories260k: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    ids = sample_text(model, find_start(model, tokenizer), samples=4, seq_len=128, seed=0)
    text = tokenizer.decode(ids.flatten(), skip_special_tokens=True)
    assert " the " in text
    # Text that the model is likely to write: far below the 512 of a uniform draw.
    assert model(ids, labels=ids).loss.exp() < 8


OWN_CACHES: dict[str, dict[str, Any]] = {
    "minimax": {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 8,
    },
    # It takes a cache and does not give it back.
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6, "head_dim": 8},
}


@pytest.mark.parametrize("architecture", OWN_CACHES)
def test_a_model_with_a_cache_of_its_own(tiny_model: Any, architecture: str) -> None:
    model = tiny_model(architecture, **OWN_CACHES[architecture])
    ids = sample_text(model, Start("bos", 1), samples=3, seq_len=12, seed=0)
    assert torch.equal(ids, sample_naively(model, 1, 3, 12, seed=0))


def test_a_model_that_mixes_texts_of_a_batch_up_is_refused(tiny_model: Any) -> None:
    model = tiny_model("rwkv", attention_hidden_size=32, context_length=128)
    with pytest.raises(HalfplateError, match="RwkvForCausalLM gives 2 rows of logits for 1 tokens"):
        sample_text(model, Start("bos", 1), samples=2, seq_len=6, seed=0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("forgets", r"LlamaForCausalLM computes different logits token by token .*\(relative difference [\d.]+\)"),
        ("none", "LlamaForCausalLM computes different logits token by token"),
        ("fails", r"LlamaForCausalLM cannot sample text \(ValueError: it has a cache of its own\)"),
    ],
)
def test_a_cache_that_does_not_work_is_refused(tiny_model: Any, broken: str, message: str) -> None:
    model = tiny_model("llama")
    forward = model.forward

    class Own:
        """A cache that is none of transformers'."""

    def without(input_ids: torch.Tensor, use_cache: bool, cache: Any = None) -> Any:
        if broken == "fails" and use_cache:
            raise ValueError("it has a cache of its own")
        output = forward(input_ids=input_ids, use_cache=False)
        output.cache = Own() if broken == "forgets" else None
        return output

    model.forward = without
    with pytest.raises(HalfplateError, match=rf"^calibration=self: {message}.*; pass a text file") as refused:
        sample_text(model, Start("bos", 1), samples=2, seq_len=6, seed=0)
    assert "\n" not in str(refused.value)
