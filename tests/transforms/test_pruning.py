"""`halfplate prune`: an ordinary smaller model that other programs load, and what can be done with it; resuming, and refusals."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfplate
from halfplate.checkpoint.read import load
from halfplate.cli import main
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.sources import load_dense
from halfplate.telemetry.progress import NO_FACTS
from structured_models import IDS, logits, pruned, saved

TEXT = {"samples": 4, "seq_len": 16, "threads": 1}
QUICK = ["--samples", "4", "--seq-len", "16", "--threads", "1", "--quiet"]
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(3, 27).reshape(2, 12)).logits, sys.argv[2])
assert "halfplate" not in sys.modules
"""


class Killed(BaseException):
    """Stands in for kill -9 where a test must know the moment."""


def digests(folder):
    files = (path for path in folder.iterdir() if path.name != "log.jsonl")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_command_writes_a_model_that_transformers_loads_alone(tiny_tokenizer, tmp_path, capsys):
    source, out = saved(tiny_tokenizer, tmp_path / "model"), tmp_path / "out"
    command = ["prune", source.name, "-o", str(out), "--keep", "0.6", "--transforms", "flap", *QUICK]
    assert main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parameters"] <= 0.6 * summary["dense_parameters"]
    assert summary["nbytes"] < 0.65 * summary["source_nbytes"]
    assert summary["check"]["kl"] > 0
    subprocess.run([sys.executable, "-c", PLAIN, str(out), str(tmp_path / "logits.pt")], check=True, timeout=120)
    expected = load_dense(str(out)).model(IDS).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)
    record = json.loads((out / "halfplate.json").read_text())
    assert record["pruned"]["transforms"] == ["flap@1"]
    assert record["calibration"]["tokens"] == 64
    assert "pruned by Halfplate" in (out / "README.md").read_text()
    assert not WorkFolder(out).path.exists()
    assert main([*command, "--overwrite", "--no-check"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"keeps \S+% of 0.\d million parameters: 2 of 4 heads of k and v, \d+ of 128 MLP channels", shown)
    assert "KL" not in shown


def test_a_llama_that_becomes_a_mistral_is_one_everywhere(tiny_tokenizer, tmp_path):
    """In transformers alone, with the same tokens, in GGUF, and under its teacher."""
    options = {"num_attention_heads": 10, "num_key_value_heads": 10, "hidden_size": 160}
    source, out = saved(tiny_tokenizer, tmp_path / "model", **options), tmp_path / "out"
    halfplate.prune(source.name, out, 0.85, transforms=["slicegpt"], check=False, **TEXT)
    model = load_dense(str(out))
    assert (model.model.config.model_type, model.model.config.hidden_size) == ("mistral", 128)
    assert model.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    subprocess.run([sys.executable, "-c", PLAIN, str(out), str(tmp_path / "logits.pt")], check=True, timeout=120)
    expected = model.model(IDS).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)
    halfplate.export(out, tmp_path / "model.gguf", format="gguf", embedding_type="f32")
    again = load_dense(str(tmp_path / "model.gguf")).model(IDS).logits
    assert float((again - expected).norm() / expected.norm()) < 5e-3
    text = tmp_path / "text.txt"
    text.write_text("The bird saw a red ball near the house, and it wanted to play. " * 60)
    options = {"tokens": 64, "seq_len": 16, "text": str(text), "batch": 2}
    found = halfplate.recover(out, source.name, tmp_path / "recovered", **options)
    assert found["after"]["kl"] < found["before"]["kl"]


@pytest.mark.parametrize("name", ["flap", "modegpt", "slicegpt", "depth"])
def test_gguf_holds_the_smaller_model(tiny_tokenizer, tmp_path, name):
    """Biases, narrow heads with frequencies of their own, a head of its own, fewer layers."""
    source = saved(tiny_tokenizer, tmp_path / "model")
    halfplate.prune(source.name, tmp_path / "out", 0.6, transforms=[name], check=False, **TEXT)
    halfplate.export(tmp_path / "out", tmp_path / "model.gguf", format="gguf", embedding_type="f32")
    again = load_dense(str(tmp_path / "model.gguf")).model
    expected = load_dense(str(tmp_path / "out")).model(IDS).logits
    # The linears are F16 in the file.
    assert float((again(IDS).logits - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("name", ["flap", "modegpt", "slicegpt", "depth"])
def test_the_result_is_compressed_and_recovered_further(tiny_tokenizer, tmp_path, name):
    source, out = saved(tiny_tokenizer, tmp_path / "model"), tmp_path / "out"
    halfplate.prune(source.name, out, 0.6, transforms=[name], **TEXT)
    text = tmp_path / "text.txt"
    text.write_text("The bird saw a red ball near the house, and it wanted to play. " * 60)
    options = {"tokens": 64, "seq_len": 16, "text": str(text), "batch": 2}
    found = halfplate.recover(out, source.name, tmp_path / "recovered", **options)
    assert found["after"]["kl"] < found["before"]["kl"]
    weight = "model.layers.0.mlp.up_proj.weight"
    before, after = (load_dense(str(tmp_path / folder)).model for folder in ("out", "recovered"))
    assert not torch.equal(before.state_dict()[weight], after.state_dict()[weight])
    assert (tmp_path / "recovered" / "config.json").read_bytes() == (out / "config.json").read_bytes()
    recipe = {"method": "gptq", "core_dtype": "int4", "group_size": 32, "pattern": "dense"}
    halfplate.compress(tmp_path / "recovered", tmp_path / "int4", **recipe, **TEXT)
    trained = halfplate.recover(tmp_path / "int4", source.name, tmp_path / "int4-recovered", **options)
    if name in ("slicegpt", "depth"):
        with pytest.raises(HalfplateError, match="square_head=1 compares the outputs of every layer"):
            halfplate.recover(tmp_path / "int4", source.name, tmp_path / "no", **options, square_head=1.0)
    assert trained["after"]["kl"] > 0


@pytest.mark.parametrize("name", ["flap", "modegpt", "magnitude-structured", "slicegpt", "depth"])
def test_compress_prunes_first(tiny_tokenizer, tmp_path, name):
    """The checkpoint is that of the pruned model, and the KL is to the original."""
    source = saved(tiny_tokenizer, tmp_path / "model")
    recipe = {"method": "gptq", "core_dtype": "int8", "group_size": 32, "pattern": "dense"}
    summary = halfplate.compress(source.name, tmp_path / "out", transforms=[name], keep=0.6, **recipe, **TEXT)
    halfplate.prune(source.name, tmp_path / "pruned", 0.6, transforms=[name], **TEXT)
    model = load(tmp_path / "out", kernels=False)
    smaller = load_dense(str(tmp_path / "pruned")).model
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    found, wanted, before = ([getattr(one.config, name) for name in sizes] for one in (model, smaller, source))
    assert found == wanted != before
    expected = smaller(IDS).logits
    assert float((model(IDS).logits - expected).norm() / expected.norm()) < 0.05
    original = load_dense(source).model
    assert float((expected - original(IDS).logits).norm() / expected.norm()) > 0.1
    record = json.loads((tmp_path / "out" / "halfplate.json").read_text())
    assert record["recipe"]["keep"] == 0.6
    # Also of magnitude slicing, because GPTQ reads it.
    assert record["calibration"]["tokens"] == 64
    assert summary["check"]["kl"] > 1e-3


def test_a_gguf_file_is_pruned_after_its_conversion(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    halfplate.export(source.name, tmp_path / "model.gguf", format="gguf", embedding_type="f32")
    models = []
    for name in ("model.gguf", "model"):
        halfplate.prune(tmp_path / name, tmp_path / "out", 0.7, transforms=["magnitude-structured"], overwrite=True)
        models.append(load_dense(str(tmp_path / "out")).model)
    expected = models[1](IDS).logits
    # The file holds F16, and the folder made of it bf16.
    assert float((models[0](IDS).logits - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(("phase", "after"), [("measuring", 1), ("measuring", 3), ("transforming", 12)])
def test_the_same_bytes_after_a_break_anywhere(tiny_tokenizer, tmp_path, phase, after):
    source, out = saved(tiny_tokenizer, tmp_path / "model"), tmp_path / "out"
    options = {"transforms": ["modegpt"], **TEXT}
    halfplate.prune(source.name, tmp_path / "whole", 0.6, **options)

    def kill(at, done, total, note="", share=None, facts=NO_FACTS):
        if at == phase and done >= after:
            raise Killed

    with pytest.raises(Killed):
        halfplate.prune(source.name, out, 0.6, report=kill, **options)
    kept = {path: path.stat().st_mtime_ns for path in WorkFolder(out).path.rglob("*-statistics/*.safetensors")}
    assert len(kept) == (4 if phase == "transforming" else after)
    with pytest.raises(HalfplateError, match=r"keep was 0\.6 when .* and is 0\.7 now"):
        halfplate.prune(source.name, out, 0.7, resume=True, **options)

    def seen(at, done, total, note="", share=None, facts=NO_FACTS):
        if at == "transforming":
            assert {path: path.stat().st_mtime_ns for path in kept} == kept

    halfplate.prune(source.name, out, 0.6, report=seen, resume=True, **options)
    assert digests(out) == digests(tmp_path / "whole")
    assert not WorkFolder(out).path.exists()
    # A finished result is recognised, and another one is not taken for it.
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = halfplate.prune(source.name, out, 0.6, resume=True, **options)
    assert again["check"]["kl"] > 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(HalfplateError, match=r"keep was 0\.6 when .* was made and is 0\.7 now"):
        halfplate.prune(source.name, out, 0.7, resume=True, **options)


def test_lost_hidden_states_are_made_again(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    whole = logits(pruned(source, tmp_path / "whole", "slicegpt", 0.7))

    def kill(at, done, total, note="", share=None, facts=NO_FACTS):
        if at == "measuring" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        pruned(source, tmp_path / "out", "slicegpt", 0.7, report=kill)
    hidden = list(WorkFolder(tmp_path / "out").path.rglob("*-hidden/00002.*"))
    assert hidden
    for path in hidden:
        path.write_bytes(b"damaged")
    assert torch.equal(logits(pruned(source, tmp_path / "out", "slicegpt", 0.7)), whole)


def test_the_plan_tells_the_sizes_and_counts_what_is_measured(tiny_tokenizer, tmp_path, capsys):
    source = saved(tiny_tokenizer, tmp_path / "model")
    options = ["--keep", "0.6", "--method", "rtn", "--core-dtype", "int8", "--no-benchmark", "--samples", "4"]
    words = ["plan", source.name, *options, "--seq-len", "16", "--json", "--transforms"]
    found = {}
    for name in ("magnitude-structured", "modegpt"):
        assert main([*words, name]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    (plain,), (measured,) = (plan["transforms"] for plan in found.values())
    assert re.match(r"keeps \d\d\.\d% of 0\.\d million parameters: 2 of 4 heads of k and v, \d+ of 128", plain["told"])
    assert "4 of 8 pairs of values in each head" in measured["told"]
    # Second moments of the channels, in every layer, and the hidden states.
    assert measured["disk_bytes"] - plain["disk_bytes"] > 4 * 4 * 128**2 + 2 * 4 * 64 * 64
    assert measured["memory_bytes"] > plain["memory_bytes"]
    assert found["modegpt"]["parameters"] <= 0.6 * source.nbytes / 4


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[0]


def test_bad_input_is_one_line_before_any_work(tiny_tokenizer, tmp_path, capsys):
    folder, out = saved(tiny_tokenizer, tmp_path / "model").name, tmp_path / "out"
    command = ("prune", folder, "-o", out, "--keep")
    for keep in ("0", "1.5", "-1", "nan"):
        assert "must be a fraction of the parameters, above 0 and at most 1; try 0.75" in refused(
            capsys, *command, keep
        )
    error = refused(capsys, *command, "0.05", "--transforms", "flap")
    assert re.search(
        r"keep=0.05 is too small: with 2 of 4 heads of k and v, 32 of 128 MLP channels, the fewest .* has 0\.\d+", error
    )
    assert "with 1 of 4 layers, the fewest" in refused(capsys, *command, "0.05", "--transforms", "depth")
    assert "with 32 of 64 hidden dimensions" in refused(capsys, *command, "0.05", "--transforms", "slicegpt")
    assert "'flapp' is unknown; did you mean 'flap'" in refused(capsys, *command, "0.5", "--transforms", "flapp")
    assert "is for one transform" in refused(capsys, *command, "0.5", "--transforms", "rotate")
    assert "2 do (depth@1, flap@1): prune in several steps" in refused(
        capsys, *command, "0.5", "--transforms", "depth", "flap"
    )
    error = refused(capsys, *command, "0.7", "--calibration", tmp_path / "none.txt")
    assert "none.txt" in error
    error = refused(capsys, "compress", folder, "-o", out, "--transforms", "flap")
    assert "transforms='flap@1' needs keep" in error
    assert "none does: try flap" in refused(capsys, "compress", folder, "-o", out, "--keep", "0.5")
    other = saved(tiny_tokenizer, tmp_path / "phi", "phi").name
    error = refused(capsys, "prune", other, "-o", out, "--keep", "0.7")
    assert (
        "it is not known which dimensions of a phi model shrink together; expected one of llama, mistral, qwen2, qwen3"
        in error
    )
    mixed = saved(
        tiny_tokenizer, tmp_path / "qwen2", "qwen2", layer_types=["full_attention", "sliding_attention"] * 2
    ).name
    error = refused(capsys, "prune", mixed, "-o", out, "--keep", "0.7", "--transforms", "depth")
    assert "its layers are of several kinds (full_attention, sliding_attention)" in error
    config = halfplate.HalfplateConfig(recipe=halfplate.Recipe(transforms=["flap"], keep=0.5))
    with pytest.raises(HalfplateError, match=r"keep=0\.5 makes the model smaller than the one that is being loaded"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(HalfplateError, match="option='pattern' is unknown"):
        halfplate.prune(folder, out, 0.7, pattern="2:4")
    assert not out.exists()
    assert not WorkFolder(out).path.exists()
