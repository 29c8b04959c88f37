"""Which steps of the native decoder round inputs to int8, and what a sequence then owes to those beside it."""

import pytest
import torch

import halfplate
from halfplate.kernels import linear, native
from halfplate.recipe import Recipe
from halfplate.runtime.prompts import new_cache
from native_batches import batch_logits

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
rounds = pytest.mark.skipif(not linear.multiplies_bytes(), reason="int8 is not the fastest type of this processor")
LENGTH = 6


@pytest.fixture(scope="module")
def models(compressed_once):
    """A checkpoint without wrappers, by its mode of activations."""
    recipe = Recipe(method="rtn", pattern="dense", core_dtype="nl4", group_size=32, head_dtype="int8")
    folder = str(compressed_once(recipe))
    return {mode: halfplate.load(folder, activations=mode) for mode in ("auto", "float")}


def logits_of(model, count):
    """Logits of the first `count` of the same texts."""
    ids = torch.randint(3, 100, (12, LENGTH), generator=torch.Generator().manual_seed(3))[:count]
    return batch_logits(model, ids, torch.ones_like(ids))


def test_floats_do_not_depend_on_other_sequences(models):
    alone = logits_of(models["float"], 1)
    for count in (2, 4, 12):
        torch.testing.assert_close(logits_of(models["float"], count)[:1], alone, rtol=1e-4, atol=1e-5)


@rounds
def test_few_sequences_are_not_rounded(models):
    for count in (1, linear.bytes_from(False) - 1):
        assert torch.equal(logits_of(models["auto"], count), logits_of(models["float"], count))


@rounds
def test_a_batch_is_rounded_alike_whatever_its_size(models):
    least = linear.bytes_from(False)
    rounded, exact = logits_of(models["auto"], least), logits_of(models["float"], least)
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
    for count in (5, 12):
        torch.testing.assert_close(logits_of(models["auto"], count)[:least], rounded, rtol=1e-5, atol=1e-6)


@rounds
@torch.no_grad()
def test_exact_rows_are_single_steps(models):
    ids = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(4))
    found = {}
    for mode, exact in (("float", False), ("auto", True), ("auto", False)):
        decoder, cache = models[mode].native_decoder, new_cache(models[mode])
        decoder.read(ids[:, :2], cache, None, None, 1)
        found[mode, exact] = decoder.step_rows(ids[:, 2:], cache, exact=exact)
    assert torch.equal(found["auto", True], found["float", False])
    assert not torch.equal(found["auto", False], found["float", False])
