"""--share-wrappers from the plan to the loaded model: one wrapper for what reads one input, everywhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import halfplate
from halfplate.checkpoint.read import inspect_checkpoint
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.exports import export
from halfplate.formats import CompressedLinear
from halfplate.models.sources import load_dense
from halfplate.planning import make_plan
from halfplate.recipe import Recipe
from halfplate.recovery.trainable import TrainableLinear, trainable
from halfplate.runtime import restore

SMALL = {
    "samples": 8,
    "seq_len": 32,
    "block_size": 8,
    "method_options": {"iterations": 3},
    "threads": 1,
}
IDS = torch.arange(1, 25).reshape(2, 12)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def shared(compressed_once, tmp_path):
    return shutil.copytree(compressed_once(Recipe(**SMALL, share_wrappers=True)), tmp_path / "out")


def entries(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]


def test_what_shares_an_input_shares_a_wrapper(tiny_folder):
    plan = make_plan(str(tiny_folder), Recipe(**SMALL, share_wrappers=True))
    lenders = {name.rpartition(".")[2]: spec.in_shared for name, spec in plan.specs.items() if ".0." in name}
    gate = "model.layers.0.mlp.gate_proj"
    assert lenders == {
        "q_proj": None,
        "k_proj": Q,
        "v_proj": Q,
        "o_proj": None,
        "gate_proj": None,
        "up_proj": gate,
        "down_proj": None,
    }
    alone = make_plan(str(tiny_folder), Recipe(**SMALL))
    assert alone.nbytes - plan.nbytes == 2 * 3 * (32 * 8 * 2)
    assert plan.wrapper_share < alone.wrapper_share


def test_only_what_is_compressed_shares(tiny_folder):
    plan = make_plan(str(tiny_folder), Recipe(**SMALL, share_wrappers=True, exclude=("*.q_proj",)))
    assert plan.specs["model.layers.1.self_attn.v_proj"].in_shared == "model.layers.1.self_attn.k_proj"
    assert plan.specs["model.layers.1.self_attn.k_proj"].in_shared is None


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("dense", {}),
        ("compressed", {}),
        ("dense", {"out_block_size": 16, "core_dtype": "int4", "wrapper_dtype": "int8"}),
        ("compressed", {"out_block_size": 0, "pattern": "dense", "core_dtype": "int3", "tune_block": 2}),
        ("compressed", {"pattern": "1:4"}),
    ],
    ids=str,
)
def test_the_model_on_disk_is_one_on_every_path(tiny_folder, tmp_path, inputs, options):
    summary = compress(
        str(tiny_folder), tmp_path / "out", Recipe(**SMALL | options, inputs=inputs, share_wrappers=True)
    )
    expected = halfplate.load(tmp_path / "out", kernels=False)(IDS).logits
    # On the kernels, saved again, and taken back.
    fast = halfplate.load(tmp_path / "out")
    torch.testing.assert_close(fast(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    fast.save_pretrained(tmp_path / "again")
    assert entries(tmp_path / "again") == entries(tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    restore(fast)
    assert torch.equal(fast(IDS).logits, expected)
    stored = sum(t.nbytes for n, t in before.items() if n.rpartition(".")[0] in entries(tmp_path / "out"))
    assert summary["nbytes"] == stored == inspect_checkpoint(tmp_path / "out", verify=True)["nbytes"]


@pytest.mark.slow
def test_automodel_and_export_and_the_documents_reader(shared, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = halfplate.load(shared, kernels=False)
    model = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    export(shared, tmp_path / "dense")
    dense = load_dense(str(tmp_path / "dense")).model
    document = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    code += f"np.savez({str(tmp_path / 'read.npz')!r}, **read_matrices({str(shared)!r}))\n"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    read = np.load(tmp_path / "read.npz")
    for name in read:
        matrix = expected.get_submodule(name).matrix.dense(torch.float64).detach()
        np.testing.assert_allclose(read[name], matrix.numpy(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dense.get_submodule(name).weight, matrix.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda entry: entry.update(in_shared="model.layers.9.self_attn.q_proj"), "names no compressed module"),
        (lambda entry: entry.update(in_shared="model.layers.0.self_attn.v_proj"), "stores no input wrapper of its own"),
        (lambda entry: entry.update(in_shared="model.layers.0.self_attn.k_proj"), "stores no input wrapper of its own"),
        (lambda entry: entry.update(in_shared="model.layers.0.mlp.down_proj"), "d_in is 48 there and 32 here"),
        (lambda entry: entry.update(in_block=16), "in_block is 8 there and 16 here"),
        (lambda entry: entry.update(in_shared=["q"]), "in_shared must be the name of a module"),
        (lambda entry: entry.update(in_shared=""), "shares no wrapper"),
        (lambda entry: entry.pop("in_shared"), "k_proj.weight_in_blocks is missing"),
    ],
)
def test_references_of_no_writer_are_refused(shared, change, complaint):
    path = shared / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["modules"]["model.layers.0.self_attn.k_proj"])
    path.write_text(json.dumps(config))
    for door in (halfplate.load, inspect_checkpoint):
        with pytest.raises(HalfplateError, match=complaint):
            door(shared)


def test_tensors_of_no_writer_are_refused(shared):
    path = shared / "model.safetensors"
    tensors = load_file(path)
    extra = tensors | {"model.layers.0.self_attn.k_proj.weight_in_blocks": tensors[f"{Q}.weight_in_blocks"].clone()}
    save_file(extra, path, metadata={"format": "pt"})
    with pytest.raises(HalfplateError, match=r"k_proj\.weight_in_blocks .* does not belong"):
        halfplate.load(shared)
    del tensors[f"{Q}.weight_in_blocks"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(HalfplateError, match=r"q_proj\.weight_in_blocks is missing"):
        halfplate.load(shared)


def test_training_moves_one_wrapper_for_all(shared):
    model = halfplate.load(shared, kernels=False)
    before = model(IDS).logits
    with trainable(model, values_too=False) as inside:
        names = [name for name, parameter in model.named_parameters() if name.endswith("InWrapper.blocks")]
        assert len(names) == 2 * 4  # q, o, gate and down of two blocks
        k = inside["model.layers.0.self_attn.k_proj"]
        assert isinstance(k.lender, TrainableLinear)
        model(IDS).logits.square().mean().backward()
        with torch.no_grad():
            inside[Q].InWrapper.blocks.mul_(0)
        assert not k.dense().any()
    assert not torch.equal(model(IDS).logits, before)
    k = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert isinstance(k, CompressedLinear)
    assert k.lender is model.get_submodule(Q)
    assert not k.matrix.dense().any()
    with (
        pytest.raises(HalfplateError, match="shares the input wrapper of a module outside"),
        trainable(torch.nn.Sequential(k), values_too=True),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"share_wrappers": True, "block_size": 0}, "has no wrapper to share"),
        ({"share_wrappers": True, "method": "wanda"}, "share_wrappers=True needs a method with wrappers"),
        ({"out_block_size": 8, "method": "slim"}, "out_block_size=8 needs a method with wrappers"),
        ({"out_block_size": -1}, "out_block_size=-1 is negative"),
    ],
)
def test_recipes_that_mean_nothing(options, complaint):
    with pytest.raises(HalfplateError, match=complaint):
        Recipe(**options)


@pytest.mark.slow
def test_block_sizes_of_their_own(tiny_folder, tmp_path):
    compress(str(tiny_folder), tmp_path / "out", Recipe(**SMALL, out_block_size=16))
    assert {(entry["out_block"], entry["in_block"]) for entry in entries(tmp_path / "out").values()} == {(16, 8)}
    halfplate.load(tmp_path / "out")


@pytest.mark.slow
def test_a_budget_gives_those_that_share_one_level(tiny_folder, tmp_path):
    recipe = Recipe(**SMALL | {"block_size": 16}, share_wrappers=True, budget=0.75, choose=("block_size",))
    summary = compress(str(tiny_folder), tmp_path / "out", recipe)
    assert summary["nbytes"] <= 0.75 * summary["dense_nbytes"]
    found, lent = entries(tmp_path / "out"), 0
    for entry in found.values():
        if "in_shared" in entry:
            lent += 1
            lender = found[entry["in_shared"]]
            assert [lender[key] for key in ("out_block", "in_block")] == [
                entry[key] for key in ("out_block", "in_block")
            ]
    assert lent
    halfplate.load(tmp_path / "out")
    with pytest.raises(HalfplateError, match=r"budget=0\.5 cannot be met: the least is 0\.5625"):
        make_plan(str(tiny_folder), Recipe(**SMALL, share_wrappers=True, budget=0.5, choose=("block_size",)))
