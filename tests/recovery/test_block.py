"""Block-output tuning on a tiny model: never worse, deterministic, written to the checkpoint."""

import json

import pytest
import torch

import halfplate
from halfplate.checkpoint.read import inspect_checkpoint
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe

# What a plain mask leaves is far from the best, so that a few steps show.
SMALL = {"method": "magnitude", "samples": 32, "seq_len": 32}


def output_error(out, folder):
    dense, model = load_dense(str(folder)).model, halfplate.load(out)
    ids = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float((model(ids).logits - dense(ids).logits).square().mean())


@pytest.mark.slow
def test_tuning_lowers_the_error_of_the_blocks(tiny_folder, tmp_path):
    plain = compress(str(tiny_folder), tmp_path / "plain", Recipe(**SMALL))
    tuned = compress(str(tiny_folder), tmp_path / "tuned", Recipe(**SMALL, tune_block=30))
    assert plain["tuned_blocks"] == {}
    record = json.loads((tmp_path / "tuned" / "halfplate.json").read_text())
    assert record["tuned_blocks"] == tuned["tuned_blocks"]
    assert tuned["tuned_blocks"]
    for block in tuned["tuned_blocks"].values():
        assert block["after"] <= block["before"]
    # The errors of the matrices are those of the solver.
    assert [inspect_checkpoint(tmp_path / name)["tuned"] for name in ("plain", "tuned")] == [False, True]
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "2 of 2 layers are closer to the original" in card
    assert "on their calibration inputs, before tuning" in card
    assert output_error(tmp_path / "tuned", tiny_folder) < output_error(tmp_path / "plain", tiny_folder)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tiny_folder, tmp_path):
    for name in ("one", "two"):
        compress(str(tiny_folder), tmp_path / name, Recipe(**SMALL, tune_block=5))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("core_dtype", ["int4", "int8"])
def test_scales_are_tuned_at_a_rate_of_their_own(tiny_folder, tmp_path, core_dtype):
    recipe = Recipe(**SMALL, core_dtype=core_dtype, tune_block=30)
    blocks = compress(str(tiny_folder), tmp_path / "out", recipe)["tuned_blocks"].values()
    assert blocks
    assert all(block["after"] < block["before"] for block in blocks)


@pytest.mark.parametrize("options", [{"method": "wanda"}, {"method": "armor", "block_size": 4}], ids=str)
def test_other_methods_are_never_worse_off(tiny_folder, tmp_path, options):
    recipe = Recipe(**options, samples=16, seq_len=32, tune_block=10)
    summary = compress(str(tiny_folder), tmp_path / "out", recipe)
    blocks = summary["tuned_blocks"].values()
    assert blocks
    assert all(block["after"] <= block["before"] for block in blocks)


def test_tuning_needs_compressed_inputs():
    with pytest.raises(HalfplateError, match="tune_block=5 needs inputs='compressed'"):
        Recipe(inputs="dense", tune_block=5)
