"""transformers' own ways of generating, on a loaded model, give what they give on the same model in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import pipeline

from halfplate.checkpoint.read import load, load_tokenizer

IDS = torch.tensor([[1, 5, 7, 11]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.fixture
def both(written: Any) -> Any:
    one = written(vocab_size=320)
    return load(one.folder), one.model, load_tokenizer(one.folder)


def tokens(model: Any, ids: torch.Tensor = IDS, **way: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model.generate(ids, max_new_tokens=6, pad_token_id=0, **way)


def test_every_way_of_generating(both: Any) -> None:
    loaded, expected, tokenizer = both
    for name, way in WAYS.items():
        assert torch.equal(tokens(loaded, **way), tokens(expected, **way)), name
    # A batch of two lengths, padded on the left, continues each as if it were alone.
    padded = torch.tensor([[0, 0, 1, 5], [1, 5, 7, 11]])
    mask = (padded != 0).long()
    found = tokens(loaded, padded, attention_mask=mask, do_sample=False)
    assert torch.equal(found[1:], tokens(loaded, padded[1:], do_sample=False))
    assert torch.equal(found[:1, 2:], tokens(loaded, padded[:1, 2:], do_sample=False))
    text = pipeline("text-generation", model=loaded, tokenizer=tokenizer)("A bird", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].startswith("A bird")


def test_a_compressed_model_drafts_for_a_dense_one(both: Any, tiny_model: Any) -> None:
    loaded, _, _ = both
    dense = tiny_model("llama", vocab_size=320)
    assert torch.equal(
        tokens(dense, assistant_model=loaded, do_sample=False, use_cache=True), tokens(dense, do_sample=False)
    )


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_computes_the_same(both: Any) -> None:
    loaded, _, _ = both
    expected = loaded(IDS).logits
    torch.testing.assert_close(torch.compile(loaded, backend="aot_eager")(IDS).logits, expected)
