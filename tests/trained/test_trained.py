"""Quality is guarded on a small model that was really trained (train.py), with no model of anybody else.

The floors are measured figures with some room; a change that loses quality breaks them.
"""

import importlib.util
from pathlib import Path

import pytest

import halfplate
from halfplate.recipe import Recipe

HERE = Path(__file__).parent
MODEL = HERE / "model"


def _script():
    spec = importlib.util.spec_from_file_location("trained_script", HERE / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Stories to calibrate with and stories to judge by, none of which the model was trained on."""
    script, folder = _script(), tmp_path_factory.mktemp("texts")
    found = {}
    for name, seed, stories in (("calibrate", script.CALIBRATE, 150), ("judge", script.JUDGE, 100)):
        found[name] = folder / f"{name}.txt"
        found[name].write_text(script.text(seed, stories))
    return found


@pytest.fixture(scope="module")
def perplexity(texts, tmp_path_factory):
    """`perplexity(recipe)` of the compressed model, None for the original, on the stories to judge by."""
    measured = {}

    def measure(recipe):
        if repr(recipe) not in measured:
            model = MODEL
            if recipe is not None:
                model = tmp_path_factory.mktemp("out") / "out"
                halfplate.compress(MODEL, model, recipe, benchmark=False, check=False)
            found = halfplate.evaluate(str(model), text=[str(texts["judge"])], seq_len=128)
            measured[repr(recipe)] = found
        return measured[repr(recipe)]

    return measure


def _recipe(texts, **fields):
    return Recipe(calibration=str(texts["calibrate"]), samples=32, seq_len=128, **fields)


def test_the_original_has_learned_the_stories(perplexity):
    assert perplexity(None)["perplexity"] < 1.32


@pytest.mark.slow
def test_armor_keeps_what_the_other_methods_lose(perplexity, texts):
    original = perplexity(None)["perplexity"]
    lost = {
        method: perplexity(_recipe(texts, method=method, block_size=block))["perplexity"] / original - 1
        for method, block in (("armor", 16), ("sparsegpt", 0), ("wanda", 0))
    }
    # Measured: 0.0002, 0.015, 0.30.
    assert lost["armor"] < 0.003, lost
    assert lost["armor"] < lost["sparsegpt"] / 5 < lost["wanda"] / 25, lost


@pytest.mark.slow
def test_few_bits_lose_less_than_by_gptq(perplexity, texts):
    original = perplexity(None)["perplexity"]
    lost = {
        (method, core): perplexity(
            _recipe(texts, method=method, pattern="dense", core_dtype=core, group_size=64, block_size=0)
        )["perplexity"]
        / original
        - 1
        for method in ("armor", "gptq")
        for core in ("int4", "int2")
    }
    # Measured: 0.0006 and 0.0007 with four bits, 0.016 and 0.029 with two.
    assert lost["armor", "int4"] < 0.003, lost
    assert lost["armor", "int2"] < 0.75 * lost["gptq", "int2"], lost
