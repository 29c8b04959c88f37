"""A part, a quantizer and an export are one file and one line of a registry each: the examples, through everything that meets them."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import halfplate
from halfplate.checkpoint.config import quantization_config, read_specs
from halfplate.checkpoint.loading import load_any
from halfplate.checkpoint.read import inspect_checkpoint, load
from halfplate.cli import main
from halfplate.errors import HalfplateError
from halfplate.exports import EXPORTS
from halfplate.formats import Chain, CompressedLinear, ExtraPart, NMSparse, OutWrapper, WeightSpec, check_stored
from halfplate.formats.parts import PARTS, part_class
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.methods import METHODS, create
from halfplate.methods.base import Method, Solution, check_inputs
from halfplate.methods.wanda import Wanda
from halfplate.pattern import DENSE
from halfplate.recipe import Recipe
from halfplate.recovery.trainable import TrainableLinear, trainable
from halfplate.report.findings import gather
from halfplate.runtime import explain
from halfplate.runtime.backends import BACKENDS
from halfplate.statistics import InputStatistics

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "extensions"
TINY = {"calibration": "self", "samples": 4, "seq_len": 32}
DIAGONAL = (ExtraPart.of("diagonal"),)


@dataclass(frozen=True)
class WithDiagonal(Wanda):
    """Wanda, and the mean of what it took off the main diagonal of each matrix."""

    name = "with-diagonal"
    parts = DIAGONAL

    def compress(self, weight, statistics, spec):
        check_inputs(self, weight, statistics, spec)
        core = super().compress(weight, statistics, spec).weight.core
        lost = (weight - core.dense()).diagonal()
        return Solution(Chain.of(spec, core, part_class("diagonal")(lost.to(torch.bfloat16))))


@pytest.fixture
def examples(monkeypatch):
    """Each example in a registry, by the line of its pyproject.toml."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for registry in (PARTS, QUANTIZERS, EXPORTS):
        (lines,) = re.findall(rf'\[project.entry-points."{registry.group}"\]\n(.*?)\n\n', _project(), re.DOTALL)
        (line,) = lines.splitlines()
        name, target = re.match(r'(\w+) = "(.*)"', line).groups()
        monkeypatch.setitem(registry.own, name, target)
    monkeypatch.setitem(METHODS.own, "with-diagonal", f"{__name__}:WithDiagonal")
    yield
    part_class.cache_clear()


def _project():
    return (FOLDER / "pyproject.toml").read_text()


def _linear(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.d_out, spec.d_in, generator=generator)
    mask = (torch.arange(spec.d_in) % spec.pattern.m < spec.pattern.n).expand(spec.d_out, -1)
    core = NMSparse.from_dense(weight, mask, spec.pattern, spec.core_dtype, spec.group)
    blocks = torch.randn(-(-spec.d_out // 4), 4, 4, generator=generator)
    outer = [OutWrapper.from_padded(blocks, spec.d_out, 4, spec.wrapper_dtype)] if spec.out_block else []
    numbers = torch.randn(min(spec.d_out, spec.d_in), generator=generator).to(torch.bfloat16)
    chain = Chain.of(spec, core, part_class("diagonal")(numbers), *outer)
    return CompressedLinear.from_weight(chain, spec, torch.randn(spec.d_out, generator=generator))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("out_block", [0, 4])
def test_a_part_is_applied_multiplied_out_checked_and_trained(examples, shape, out_block):
    spec = WeightSpec(*shape, core_dtype="int8", out_block=out_block, parts=DIAGONAL)
    linear, x = _linear(spec), torch.randn(5, spec.d_in, generator=torch.Generator().manual_seed(1))
    bare = Chain(replace(spec, parts=()), linear.matrix.core, linear.matrix.outer[:-1]).dense()
    naive = bare.clone()
    for place in range(min(shape)):
        naive[place, place] += float(linear.weight_diagonal[place])
    assert torch.equal(linear.matrix.dense(), naive)
    torch.testing.assert_close(linear(x), x @ naive.T + linear.bias)
    assert spec.layout()["weight_diagonal"] == ((min(shape),), torch.bfloat16)
    assert spec.nbytes == replace(spec, parts=()).nbytes + 2 * min(shape)
    assert spec.kinds()["weight_diagonal"] == "diagonals"
    assert WeightSpec.from_json(json.loads(json.dumps(spec.to_json())), "up") == spec
    check_stored(spec, linear.stored(), "up")
    with pytest.raises(HalfplateError, match=r"up\.weight_diagonal holds NaN"):
        check_stored(spec, linear.stored() | {"weight_diagonal": torch.full((min(shape),), torch.nan)}, "up")
    trained = TrainableLinear(linear, values_too=False)
    torch.testing.assert_close(trained(x), linear(x), rtol=1e-5, atol=1e-5)
    model = nn.Sequential(linear)
    with trainable(model, values_too=False) as inside:
        inside["0"](x).square().sum().backward()
        gradient = inside["0"].Diagonal.diagonal.grad
        assert bool((gradient != 0).all())
        with torch.no_grad():
            inside["0"].Diagonal.diagonal.add_(1)
    torch.testing.assert_close(
        model[0].weight_diagonal.float(), linear.weight_diagonal.float() + 1, rtol=1e-2, atol=1e-2
    )


def test_a_part_is_refused_by_every_backend_that_does_not_know_it(examples):
    spec = WeightSpec(8, 128, parts=DIAGONAL)
    for name in BACKENDS:
        refusal = BACKENDS.get(name).capability.refusal(spec)
        assert "no kernel" in refusal.reason
        assert "diagonal" in refusal.reason
    with pytest.raises(HalfplateError, match=r"parts=\['diagonal'\] does not match method 'wanda'; expected \[\]"):
        Wanda().check_spec(spec)
    with pytest.raises(HalfplateError, match="must be named once each"):
        WeightSpec(8, 8, parts=DIAGONAL * 2)
    with pytest.raises(HalfplateError, match=r"part='diagnal' is unknown; did you mean 'diagonal'\?"):
        WeightSpec(8, 8, parts=(ExtraPart.of("diagnal"),))


def test_a_part_goes_through_a_whole_run(examples, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    halfplate.compress(str(tiny_folder), out, Recipe(method="with-diagonal", **TINY), benchmark=False)
    assert all(spec.parts == DIAGONAL for spec in read_specs(out).values())
    assert inspect_checkpoint(out, verify=True)["verified"]
    model = load(out)
    assert "diagonal" in str(explain(model))
    assert gather(out).parts["diagonals"] == sum(2 * min(s.d_out, s.d_in) for s in read_specs(out).values())
    ids = torch.tensor([[1, 5, 9, 20]])
    logits = model(ids).logits
    assert halfplate.export(out, tmp_path / "dense")
    again = load_any(str(tmp_path / "dense"))[0]
    torch.testing.assert_close(again(ids).logits, logits, rtol=0.1, atol=0.1)
    short = ["--tokens", "128", "--samples", "4", "--seq-len", "32", "--quiet"]
    assert main(["recover", str(out), "--teacher", str(tiny_folder), "-o", str(tmp_path / "better"), *short]) == 0
    assert inspect_checkpoint(tmp_path / "better", verify=True)["verified"]


def test_a_checkpoint_names_the_package_that_reads_it(examples, tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    recipe = Recipe(method="rtn", pattern="dense", core_dtype="nf4", group_size=32)
    halfplate.compress(str(tiny_folder), out, recipe, benchmark=False)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["needs"].keys() == {"quantizer nf4"}
    assert config["needs"]["quantizer nf4"].startswith("halfplate ")
    load(out)
    monkeypatch.delitem(QUANTIZERS.own, "nf4")
    with pytest.raises(
        HalfplateError, match=r"does not know the quantizer nf4 of this checkpoint, which halfplate .* wrote; install"
    ):
        load(out)
    monkeypatch.delitem(PARTS.own, "diagonal")
    needs = {"part diagonal": "halfplate-extensions 1.0"}
    (out / "config.json").write_text(json.dumps({"quantization_config": config | {"needs": needs}}))
    with pytest.raises(
        HalfplateError,
        match=r"does not know the part diagonal of this checkpoint, which halfplate-extensions 1\.0 wrote",
    ):
        read_specs(out)
    later = config | {"version": 7, "needs": {"halfplate": "3.1"}}
    (out / "config.json").write_text(json.dumps({"quantization_config": later}))
    with pytest.raises(HalfplateError, match=r"version=7 is newer .* upgrade halfplate to 3\.1 or later"):
        read_specs(out)


def test_version_1_needs_nothing():
    specs = {"a": WeightSpec(8, 8, core_dtype="int4"), "b": WeightSpec(8, 8, DENSE, "int8", rank=2, permuted=True)}
    assert "needs" not in quantization_config(specs)


def test_a_quantizer_is_used_by_every_method(examples):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    inputs = torch.randn(300, 64, generator=generator).double()
    gram = inputs.T @ inputs / 300
    statistics = InputStatistics(300, gram.diagonal().float(), gram)
    errors = {}
    for core in ("nf4", "int4"):
        spec = WeightSpec(16, 64, DENSE, core, group=32)
        for method in ("rtn", "gptq"):
            solved: Method = create(method)
            found = solved.compress(weight, statistics, spec).weight.dense()
            errors[core, method] = float((found - weight).square().sum())
    # Weights of a normal distribution are what NF4 is for.
    assert errors["nf4", "rtn"] < errors["int4", "rtn"]
    for row in weight[:2, :32]:
        scale = torch.tensor(1.5)
        nearest = QUANTIZERS.get("nf4").decode(QUANTIZERS.get("nf4").nearest(row, scale), scale)
        table = QUANTIZERS.get("nf4").decode(torch.arange(-8, 8), scale)
        assert torch.equal(nearest, table[(row[:, None] - table).abs().argmin(1)])


def test_an_export_writes_what_the_model_computes_with(examples, tiny_folder, tmp_path, capsys):
    assert main(["export", str(tiny_folder), "-o", str(tmp_path / "model.npz"), "--format", "npz"]) == 0
    arrays = np.load(tmp_path / "model.npz")
    model = load_any(str(tiny_folder))[0]
    assert arrays.keys() == model.state_dict().keys()
    assert all(np.array_equal(arrays[name], tensor.numpy()) for name, tensor in model.state_dict().items())
    assert main(["export", str(tiny_folder), "-o", str(tmp_path / "model.npz"), "--format", "npz"]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert main(["export", str(tiny_folder), "-o", str(tmp_path / "m"), "--format", "npy"]) == 2
    assert "did you mean 'npz'?" in capsys.readouterr().err
