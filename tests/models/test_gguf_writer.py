"""GGUF files that Halfplate writes, read back and by llama.cpp; test_gguf_families.py has the families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfplate
from halfplate.cli import main
from halfplate.errors import HalfplateError
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe

IDS = torch.tensor([[1, 5, 7, 11, 30]])
TEXT = "One day a small bird, it's 2024"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_what_was_written_is_read_back(tiny_model: Any, tmp_path: Path, architecture: str) -> None:
    from halfplate.models import gguf

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    more = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False} if architecture == "qwen2" else {}
    if architecture == "qwen2":
        del sizes["head_dim"]
    if architecture == "qwen3":
        sizes["head_dim"] = 32
    model = tiny_model(architecture, **sizes, **more)
    write_gguf(model, None, tmp_path / "model.gguf")
    config = gguf.read_config(tmp_path / "model.gguf", "model.gguf")
    read, report = gguf.load_model(tmp_path / "model.gguf", "model.gguf", config)
    assert not report["missing_keys"]
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=0.01, atol=0.01)


@pytest.fixture
def exported(compressed_once: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the GGUF file that the command line made of it."""
    out, file = compressed_once(Recipe(method="magnitude")), tmp_path / "model.gguf"
    assert main(["export", str(out), "--format", "gguf", "-o", str(file)]) == 0
    assert main(["export", str(out), "--format", "gguf", "-o", str(file)]) == 2
    assert main(["export", str(out), "--format", "gguf", "-o", str(file), "--overwrite"]) == 0
    assert main(["export", str(out), "--format", "gguf", "-o", str(tmp_path / "model.bin")]) == 2
    assert sorted(path.name for path in tmp_path.glob(".*partial")) == []
    return out, file


def test_a_checkpoint_as_gguf(exported: tuple[Path, Path], tiny_tokenizer: Any) -> None:
    out, file = exported
    read = load_dense(str(file))
    expected = halfplate.load(out, kernels=False)
    torch.testing.assert_close(read.model(IDS).logits, expected(IDS).logits, rtol=0.01, atol=0.01)
    assert read.tokenizer(TEXT)["input_ids"] == tiny_tokenizer(TEXT)["input_ids"]


def test_llama_cpp_answers_as_transformers_does(exported: tuple[Path, Path], tiny_tokenizer: Any) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    out, file = exported
    llama = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    ids = llama.tokenize(TEXT.encode(), add_bos=True, special=False)
    assert ids == tiny_tokenizer(TEXT)["input_ids"]
    llama.eval(ids)
    expected = halfplate.load(out, kernels=False)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.from_numpy(llama.scores[: len(ids)].copy()), expected, rtol=0.02, atol=0.02)


def test_the_pieces_of_stories260k_survive(stories260k: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    loaded = load_dense(str(stories260k))
    write_gguf(loaded.model, loaded.tokenizer, tmp_path / "stories.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "stories.gguf"), n_ctx=64, n_threads=1, verbose=False)
    for text in (TEXT, "Lily and Tom: \u00e9\u4e2d  two  spaces"):
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == loaded.tokenizer(text)["input_ids"]


def test_what_is_not_written_is_refused(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match="the model 300 embeddings"):
        write_gguf(tiny_model("llama", vocab_size=300), tiny_tokenizer, tmp_path / "no")
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(HalfplateError, match=r"up_proj\.weight holds values beyond the range of F16"):
        write_gguf(model, None, tmp_path / "no")
