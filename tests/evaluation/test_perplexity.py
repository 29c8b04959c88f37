"""Perplexity, KL and agreement against a naive reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.evaluation import evaluate, perplexity, token_windows

WINDOWS = torch.randint(3, 128, (5, 9), generator=torch.Generator().manual_seed(0))


def evaluate_naively(model: Any, windows: Tensor, dense: Any) -> dict[str, float]:
    """Token by token, from probabilities in fp64."""
    nll, dense_nll, kl, agreed, tokens = 0.0, 0.0, 0.0, 0, 0
    for window in windows:
        p = model(window[None]).logits[0].double().exp()
        q = dense(window[None]).logits[0].double().exp()
        for position in range(len(window) - 1):
            ours, theirs = p[position] / p[position].sum(), q[position] / q[position].sum()
            truth = window[position + 1]
            nll -= math.log(ours[truth])
            dense_nll -= math.log(theirs[truth])
            kl += float((theirs * (theirs / ours).log()).sum())
            agreed += int(ours.argmax() == theirs.argmax())
            tokens += 1
    return {
        "perplexity": math.exp(nll / tokens),
        "tokens": tokens,
        "windows": len(windows),
        "seq_len": windows.shape[1],
        "kl": kl / tokens,
        "top1_agreement": agreed / tokens,
        "dense_perplexity": math.exp(dense_nll / tokens),
    }


@pytest.mark.parametrize(("tokens_at_once", "rows_at_once"), [(1024, 128), (20, 7), (1, 1)])
def test_measures_equal_a_naive_computation(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int, rows_at_once: int
) -> None:
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", tokens_at_once)
    monkeypatch.setattr(perplexity, "ROWS_AT_ONCE", rows_at_once)
    dense, model = tiny_model(), tiny_model()
    model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    expected = evaluate_naively(model, WINDOWS, dense)
    assert 0 < expected["top1_agreement"] < 1
    assert evaluate(model, WINDOWS, dense) == pytest.approx(expected, rel=1e-4)
    alone = evaluate(model, WINDOWS)
    assert list(alone) == ["perplexity", "tokens", "windows", "seq_len"]
    assert alone == pytest.approx({key: expected[key] for key in alone}, rel=1e-4)


def test_a_model_equals_itself(tiny_model: Any) -> None:
    result = evaluate(tiny_model(), WINDOWS, tiny_model())
    assert result["kl"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity"] == result["dense_perplexity"]


def test_the_kl_of_a_nearly_equal_model_is_positive_and_small(tiny_model: Any) -> None:
    model = tiny_model()
    model.model.norm.weight.mul_(1 + 1e-5)
    kl = evaluate(model, WINDOWS, tiny_model())["kl"]
    assert 0 < kl < 1e-8


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny_model: Any) -> None:
    model = tiny_model()
    model.lm_head.weight.zero_()
    assert evaluate(model, WINDOWS)["perplexity"] == pytest.approx(128)


def test_perplexity_equals_the_loss_of_transformers(tiny_model: Any) -> None:
    model = tiny_model("gemma2")
    expected = model(WINDOWS, labels=WINDOWS).loss.exp().item()
    assert evaluate(model, WINDOWS)["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("weight", "expected"), [(float("nan"), math.nan), (1e8, math.inf)])
def test_a_ruined_model_is_reported_as_it_is(tiny_model: Any, weight: float, expected: float) -> None:
    model = tiny_model()
    model.model.norm.weight.fill_(weight)
    result = evaluate(model, WINDOWS, tiny_model())
    assert result["perplexity"] == pytest.approx(expected, nan_ok=True)
    assert math.isfinite(result["dense_perplexity"])


def test_progress_counts_windows(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 20)
    seen: list[tuple[int, int]] = []
    evaluate(tiny_model(), WINDOWS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_windows_that_the_model_cannot_read_are_refused(tiny_model: Any) -> None:
    model = tiny_model()
    for windows, expected in [
        (WINDOWS[0], "shape"),
        (WINDOWS[:0], "at least one"),
        (WINDOWS[:, :1], "seq_len=1 is too short"),
        (torch.zeros(1, 129, dtype=torch.int64), "exceeds the 128 positions"),
        (WINDOWS + 100, "vocabulary of 128"),
    ]:
        with pytest.raises(HalfplateError, match=expected):
            evaluate(model, windows)


def test_models_of_two_vocabularies_are_refused(tiny_model: Any) -> None:
    with pytest.raises(HalfplateError, match="vocabulary of 160, the model one of 128"):
        evaluate(tiny_model(), WINDOWS, tiny_model(vocab_size=160))


def test_windows_are_the_first_pieces_of_the_stream(tiny_tokenizer: Any) -> None:
    documents = ["Tom and Mia came out of the house.", "", "They saw the bird and the ball."]
    stream = tiny_tokenizer("\n\n".join(documents))["input_ids"]
    assert len(stream) >= 15
    windows = token_windows(tiny_tokenizer, documents, 5, 3)
    assert windows.tolist() == [stream[0:5], stream[5:10], stream[10:15]]
    assert len(token_windows(tiny_tokenizer, documents, 5)) == len(stream) // 5
    assert windows[0, 0] == tiny_tokenizer.bos_token_id
    assert not (windows.flatten()[1:] == tiny_tokenizer.bos_token_id).any()


def test_a_text_with_too_few_windows_is_refused(tiny_tokenizer: Any) -> None:
    documents = ["Tom and Mia"]
    length = len(tiny_tokenizer(documents[0])["input_ids"])
    with pytest.raises(HalfplateError, match=rf"windows=9 of seq_len=2 need 18 tokens, .* has {length} "):
        token_windows(tiny_tokenizer, documents, 2, 9)
    with pytest.raises(HalfplateError, match=rf"seq_len up to {length}$"):
        token_windows(tiny_tokenizer, documents, 100)
    for seq_len, windows in [(1, 2), (5, 0)]:
        with pytest.raises(HalfplateError, match=r"^(seq_len=1|windows=0) "):
            token_windows(tiny_tokenizer, documents, seq_len, windows)


def test_a_real_model_reads_its_own_text_best(stories260k: Any) -> None:
    from transformers import AutoModelForCausalLM

    from halfplate.calibration.self_text import Start, sample_text

    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    windows = sample_text(model, Start("bos", 1), samples=4, seq_len=64, seed=1)
    ruined = AutoModelForCausalLM.from_pretrained(stories260k).eval().requires_grad_(False)
    ruined.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    result = evaluate(ruined, windows, model)
    assert 1 < result["dense_perplexity"] < result["perplexity"]
    assert result["kl"] > 0
