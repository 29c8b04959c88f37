"""`torch.export` of a compressed model, with the kernels as operators and without: the same logits, also from disk."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import halfplate
from conftest import build_model


class Logits(nn.Module):
    """A model as a function from tokens to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def tokens(rows, length, seed=0):
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def compressed(tiny_folder_once, tmp_path_factory):
    """A model of one block."""
    place = tmp_path_factory.mktemp("export")
    original = shutil.copytree(tiny_folder_once, place / "original")
    build_model("llama", vocab_size=320, num_hidden_layers=1).save_pretrained(original)
    options = {"iterations": 2}
    halfplate.compress(
        str(original),
        place / "compressed",
        block_size=8,
        core_dtype="int8",
        samples=4,
        seq_len=32,
        method_options=options,
    )
    return place / "compressed"


def exported(model, path):
    """The program of a model for any number of rows and tokens, also written to `path`."""
    shapes = {"input_ids": {0: torch.export.Dim("rows", min=1, max=16), 1: torch.export.Dim("length", min=2, max=128)}}
    with torch.no_grad():
        program = torch.export.export(Logits(model), (tokens(2, 24),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return program


@pytest.fixture(scope="module")
def with_kernels(compressed, tmp_path_factory):
    """The model, its program, and the file of that."""
    model, path = halfplate.load(compressed), tmp_path_factory.mktemp("program") / "program.pt2"
    return model, exported(model, path), path


@pytest.mark.parametrize("kernels", [True, False])
def test_an_exported_program_gives_the_same_logits(compressed, with_kernels, tmp_path, kernels):
    model, program, path = with_kernels
    if not kernels:
        model, path = halfplate.load(compressed, kernels=False), tmp_path / "program.pt2"
        program = exported(model, path)
    again = torch.export.load(path)
    with torch.no_grad():
        for ids in (tokens(2, 24), tokens(3, 9, seed=1)):
            expected = model(ids, use_cache=False).logits
            torch.testing.assert_close(program.module()(ids), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again.module()(ids), expected, rtol=1e-5, atol=1e-5)
    called = [node.target for node in program.graph.nodes if "halfplate" in str(node.target)]
    assert len(called) == (8 if kernels else 0)  # the linears of the block and the output layer
    if kernels:
        assert set(called) == {torch.ops.halfplate.linear.default}


def test_a_program_runs_where_only_the_operators_are_imported(with_kernels, tmp_path):
    model, _, path = with_kernels
    shutil.copy(path, tmp_path / "program.pt2")
    with torch.no_grad():
        torch.save(model(tokens(2, 24), use_cache=False).logits, tmp_path / "expected.pt")
    torch.save(tokens(2, 24), tmp_path / "tokens.pt")
    code = (
        "import sys, torch, halfplate.kernels.operators\n"
        "program = torch.export.load('program.pt2')\n"
        "logits = program.module()(torch.load('tokens.pt'))\n"
        "torch.testing.assert_close(logits, torch.load('expected.pt'), rtol=1e-5, atol=1e-5)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
