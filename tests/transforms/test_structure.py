"""Structured pruning: the same model if everything stays, units cut by hand, statistics from a whole forward pass, and refusals."""

import re

import pytest
import torch

import halfplate
from halfplate.errors import HalfplateError
from halfplate.models.sources import load_dense
from halfplate.models.streamed import StreamedModel
from halfplate.transforms import find
from halfplate.transforms.structure.graph import CHANNELS, HEADS, HIDDEN, LAYERS, PAIRS, StructureGraph
from structured_models import IDS, KINDS, logits, pruned, saved, tokens

METHODS = ("depth", "magnitude-structured", "wanda-structured", "flap", "slicegpt", "modegpt")
INT8 = {"method": "rtn", "core_dtype": "int8", "pattern": "dense"}


def parameters(source):
    return StructureGraph.of(source).parameters()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_all_of_it_is_the_same_model(tiny_tokenizer, tmp_path, name, architecture, options):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, **options)
    if name == "slicegpt" and (architecture == "qwen2" or options.get("tie_word_embeddings")):
        pytest.skip("a head of its own does not fit, or the heads would become narrower")
    result = pruned(source, tmp_path / "out", name, 1.0)
    torch.testing.assert_close(logits(result), load_dense(source).model(IDS).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("architecture", "options"), KINDS)
@pytest.mark.parametrize("keep", [0.8, 0.55])
def test_the_result_has_at_most_that_many_parameters(tiny_tokenizer, tmp_path, name, architecture, options, keep):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, **options)
    transform = find(name).keeping(keep)
    if architecture == "qwen2" and (name == "slicegpt" or keep < 0.6):
        assert name == "depth" or transform.refusal(source) is not None
        return
    result = pruned(source, tmp_path / "out", name, keep)
    found = sum(tensor.numel() for tensor in map(StreamedModel(result).read, StreamedModel(result).stored))
    assert found == parameters(result) == transform.target(source).parameters
    assert 0.5 * keep * parameters(source) < found <= keep * parameters(source)
    assert bool(logits(result).isfinite().all())
    for name in StreamedModel(result).stored:
        if name.endswith("proj.weight"):
            assert all(side % 32 == 0 for side in StreamedModel(result).shape(name))
