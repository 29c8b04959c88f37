import json
from pathlib import Path

import pytest
import torch

import halfplate
from halfplate.calibration import calibration_tokens
from halfplate.checkpoint.output import check_result_folder
from halfplate.cli import main
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.methods.magnitude import Magnitude
from halfplate.methods.solving import relative_error
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe
from halfplate.recovery.job import recover
from halfplate.recovery.settings import Recovery
from halfplate.statistics import InputStatistics, Statistic

SMALL = {"samples": 4, "seq_len": 32}


def text_file(folder):
    """The path of a text, whose tokens do not depend on how the model that reads it is run."""
    path = folder / "text.txt"
    path.write_text("One day a small bird sat in a big tree. " * 40)
    return str(path)


def test_relative_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    weight, dense = torch.randn(2, 5, 8, generator=generator)
    x = torch.randn(64, 8, generator=generator)  # (tokens, d_in)
    gram = x.T @ x / 64
    statistics = InputStatistics(64, gram.diagonal(), gram)

    error, kind = relative_error(weight, dense, statistics)
    outputs = (x @ (weight - dense).T).square().sum() / (x @ weight.T).square().sum()
    assert (error, kind) == (pytest.approx(outputs.item(), rel=1e-5), "gram")

    error, kind = relative_error(weight, dense, InputStatistics(64, gram.diagonal()))
    scale = x.square().mean(0).sqrt()
    weighted = ((weight - dense) * scale).square().sum() / (weight * scale).square().sum()
    assert (error, kind) == (pytest.approx(weighted.item(), rel=1e-5), "diagonal")

    error, kind = relative_error(weight, dense, InputStatistics())
    assert (error, kind) == (
        pytest.approx(((weight - dense).square().sum() / weight.square().sum()).item(), rel=1e-5),
        "weight",
    )


def test_relative_error_of_dead_inputs_is_zero():
    weight = torch.ones(2, 4)
    assert relative_error(weight, weight * 2, InputStatistics(8, torch.zeros(4), torch.zeros(4, 4))) == (0.0, "gram")


def test_statistics_can_be_asked_for(tiny_folder, tmp_path):
    summary = compress(str(tiny_folder), tmp_path / "out", Recipe(method="wanda", **SMALL), statistics=Statistic.GRAM)
    assert {matrix["error_kind"] for matrix in summary["matrices"]} == {"gram"}
    assert summary["error_kind"] == "gram"


def test_methods_that_need_no_statistics_collect_none(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("halfplate.compression.preparation.calibration_tokens", None)
    summary = compress(str(tiny_folder), tmp_path / "out", Recipe(method="magnitude"))
    assert summary["calibration"] is None
    assert summary["error_kind"] == "weight"


def test_statistics_come_from_the_dense_model(tiny_folder, tmp_path, monkeypatch):
    """Every block is calibrated on the hidden states of dense blocks, whatever was compressed before."""
    seen = {}
    original = Magnitude.compress

    def spy(self, weight, statistics, spec):
        seen[len(seen)] = statistics.require_diagonal()
        return original(self, weight, statistics, spec)

    monkeypatch.setattr(Magnitude, "compress", spy)
    text = text_file(tmp_path)
    recipe = Recipe(method="magnitude", inputs="dense", token_limit="none", precision="fp32", calibration=text, **SMALL)
    compress(str(tiny_folder), tmp_path / "out", recipe, statistics=Statistic.DIAGONAL)

    loaded = load_dense(str(tiny_folder))
    inputs = []
    names = [name for name, module in loaded.model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names:
        loaded.model.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args: inputs.append((module, args[0]))
        )
    tokens = calibration_tokens(text, loaded.model, loaded.tokenizer, 4, 32, 0)
    inputs.clear()
    loaded.model(input_ids=tokens.ids)
    expected = {id(module): x.square().mean((0, 1)) for module, x in inputs}
    for index, name in enumerate(names):
        torch.testing.assert_close(seen[index], expected[id(loaded.model.model.get_submodule(name))])


@pytest.mark.parametrize("cross_damping", ["none", 0.1])
def test_statistics_come_through_what_is_compressed_so_far(tiny_folder, tmp_path, monkeypatch, cross_damping):
    """Each matrix is calibrated on what the finished model, cut off there, makes of the tokens."""
    seen = {}
    original = Magnitude.compress

    def spy(self, weight, statistics, spec):
        seen[len(seen)] = statistics.require_diagonal()
        assert (statistics.cross is not None) == (cross_damping != "none")
        return original(self, weight, statistics, spec)

    monkeypatch.setattr(Magnitude, "compress", spy)
    out = tmp_path / "out"
    text = text_file(tmp_path)
    exact = {"token_limit": "none", "core_dtype": "fp32", "calibration": text}
    recipe = Recipe(method="magnitude", cross_damping=cross_damping, **exact, **SMALL)
    compress(str(tiny_folder), out, recipe, statistics=Statistic.GRAM)

    loaded = load_dense(str(tiny_folder))
    tokens = calibration_tokens(text, loaded.model, loaded.tokenizer, 4, 32, 0)
    finished = halfplate.load(out, kernels=False)
    names = [name for name, module in loaded.model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    inputs = {}
    for name in names:
        finished.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].square().mean((0, 1))})
        )
    finished(input_ids=tokens.ids)
    for index, name in enumerate(names):
        torch.testing.assert_close(seen[index], inputs[name], rtol=2e-2, atol=1e-3)


@pytest.mark.slow
def test_correction_towards_the_dense_outputs_changes_the_result(tiny_folder, tmp_path):
    results = {}
    for cross_damping in ("none", 0.1):
        recipe = Recipe(method="sparsegpt", cross_damping=cross_damping, **SMALL)
        compress(str(tiny_folder), tmp_path / str(cross_damping), recipe)
        results[cross_damping] = halfplate.load(tmp_path / str(cross_damping))(torch.arange(20)[None]).logits
    assert bool(results[0.1].isfinite().all())
    assert not torch.equal(results["none"], results[0.1])


def test_the_written_model_is_what_was_solved(tiny_folder, tmp_path):
    out = tmp_path / "out"
    summary = compress(
        str(tiny_folder), out, Recipe(method="armor", method_options={"iterations": 2}, block_size=4, **SMALL)
    )
    model = halfplate.load(out)
    dense = load_dense(str(tiny_folder)).model
    record = json.loads((out / "halfplate.json").read_text())
    assert record["matrices"].keys() == {matrix["name"] for matrix in summary["matrices"]}
    assert all("seconds" not in matrix for matrix in record["matrices"].values())
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, dense(ids).logits)
    for matrix in summary["matrices"]:
        assert len(matrix["losses"]) >= 2
        assert list(matrix["losses"]) == sorted(matrix["losses"], reverse=True)
        assert 0 < matrix["relative_error"] < 1


def test_report_tells_every_phase_to_its_end(tiny_folder, tmp_path):
    told = {}
    compress(
        str(tiny_folder),
        tmp_path / "out",
        Recipe(method="wanda", **SMALL),
        report=lambda phase, done, total, *more, **named: told.update({phase: (done, total)}),
    )
    assert told["compressing"] == (14, 14)
    assert {"reading", "calibration text", "writing"} <= told.keys()
    assert all(done == total for done, total in told.values())


def test_skipped_matrices_are_recorded(tiny_folder, tmp_path):
    summary = compress(str(tiny_folder), tmp_path / "out", Recipe(method="magnitude", include=("*.1.*",)))
    assert len(summary["matrices"]) == len(summary["skipped"]) == 7
    record = json.loads((tmp_path / "out" / "halfplate.json").read_text())
    assert record["skipped"].keys() == {matrix["name"] for matrix in summary["skipped"]}


@pytest.mark.slow
def test_threads_are_set(tiny_folder, tmp_path):
    before = torch.get_num_threads()
    try:
        compress(str(tiny_folder), tmp_path / "out", Recipe(method="magnitude", threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("out", ["/", "a" * 300, "a" * 250, "new/" + "a" * 300, "loop/x", "\0"])
def test_places_that_no_system_knows(tiny_folder, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for resume in (False, True):
        with pytest.raises(HalfplateError, match=r"out=.*choose another folder"):
            compress(str(tiny_folder), out, Recipe(method="magnitude"), resume=resume)
    with pytest.raises(HalfplateError, match=r"out=.*choose another folder"):
        recover(tiny_folder, str(tiny_folder), out, Recovery(tokens=64), resume=True)
    assert main(["plan", str(tiny_folder), "-o", out]) == 2
    assert not Path("new").exists()


def test_result_folder(tmp_path):
    source = tmp_path / "models" / "dense"
    source.mkdir(parents=True)
    check_result_folder(tmp_path / "new" / "deep", False, source)
    (tmp_path / "empty").mkdir()
    check_result_folder(tmp_path / "empty", False, source)
    for inside in (source, tmp_path / "models", tmp_path / "models" / "x" / ".." / "dense"):
        with pytest.raises(HalfplateError, match="holds the model that is read"):
            check_result_folder(inside, True, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(HalfplateError, match="which is not a folder"):
        check_result_folder(tmp_path / "file" / "out", False, source)


@pytest.mark.slow
def test_stories260k(stories260k, tmp_path):
    """On a trained model, ARMOR's closeness to the dense model exceeds that of the mask it starts from."""
    from halfplate.calibration.held_out import held_out_tokens
    from halfplate.evaluation.perplexity import evaluate
    from halfplate.telemetry.progress import silent

    dense = load_dense(str(stories260k))
    held_out = held_out_tokens(dense.model, dense.tokenizer, 0, 4, 64, silent)
    kl = {}
    for method, block in (("nowag", 0), ("armor", 8)):
        recipe = Recipe(method=method, block_size=block, samples=16, seq_len=64, threads=1)
        compress(str(stories260k), tmp_path / method, recipe)
        kl[method] = evaluate(halfplate.load(tmp_path / method), held_out.ids, dense.model)["kl"]
    assert kl["armor"] < 0.6 * kl["nowag"]
