"""Transforms before compression: an equivalent one from the example package, a smaller model, and all that is refused."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import halfplate
from conftest import build_model
from halfplate.cli import main
from halfplate.compression.compress import compress
from halfplate.compression.transforming import transformed
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.planning.making import plan_source
from halfplate.recipe import Recipe
from halfplate.registry import installed
from halfplate.telemetry.progress import NO_FACTS, silent

IDS = torch.arange(3, 27).reshape(2, 12)
SMALL = {"samples": 12, "seq_len": 16, "threads": 1}
INT8 = {"method": "rtn", "core_dtype": "int8", "pattern": "dense"}
GROUP = "halfplate.transforms"
NORM = "model.layers.1.input_layernorm.weight"
# Keeps the first neurons of every MLP: a smaller model.
NARROW = """
import copy
from halfplate.models.streamed import StreamedModel
from halfplate.transforms import Transform

class Narrow(Transform):
    name, version, summary = "narrow", 1, "keep the first 32 neurons of every MLP"

    def refusal(self, source):
        return None if source.config.intermediate_size > 32 else "its MLPs have no more than 32 neurons"

    def configuration(self, source):
        config = copy.deepcopy(source.config)
        config.intermediate_size = 32
        return config

    def open(self, source):
        model = StreamedModel(source)
        return lambda piece: ((name, self.cut(model.read(name), shape)) for name, (_, shape) in piece.entries.items())

    def cut(self, tensor, shape):
        return tensor[tuple(map(slice, shape))]

NARROW = Narrow()
"""
# Another model altogether; {body} is what it does to a tensor.
FAULTY = """
from halfplate.models.streamed import StreamedModel
from halfplate.transforms import Transform

class Faulty(Transform):
    name, version, summary = "faulty", 1, "break something"

    def refusal(self, source):
        {refusal}

    def open(self, source):
        model = StreamedModel(source)
        return lambda piece: self.tensors(model, piece)

    def tensors(self, model, piece):
        for name in piece.entries:
            tensor = model.read(name)
            {body}

FAULTY = Faulty()
"""


class Killed(BaseException):
    """Stands in for kill -9 where a test must know the moment."""


@pytest.fixture
def narrow(install):
    install("narrowing", points=[(GROUP, "narrow = narrow_module:NARROW")], narrow_module=NARROW)


@pytest.fixture
def faulty(install):
    def put(body="yield name, tensor", refusal="return None"):
        code = FAULTY.format(body=body, refusal=refusal)
        install("faults", "2.1", points=[(GROUP, "faulty = faulty_module:FAULTY")], faulty_module=code)

    return put


def saved(tokenizer, folder, architecture="llama", **options):
    build_model(architecture, vocab_size=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(str(folder))


def result_of(source, place, *names):
    recipe = Recipe(transforms=names, **INT8)
    return transformed(source, plan_source(source, recipe).transforms, recipe, WorkFolder(place), silent)[1]


def logits(source):
    with StreamedModel(source).running(held=True) as model, torch.no_grad():
        return model(IDS, use_cache=False).logits


def digests(folder):
    told = ("log.jsonl", "report.html")  # these have times in them
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in told
    }


def killing(phase, after):
    def kill(at, done, total, note="", share=None, facts=NO_FACTS):
        if at == phase and done >= after:
            raise Killed

    return kill


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("mistral", {}),
        ("qwen3", {}),
    ],
)
def test_folded_norms_are_the_same_model(examples, tiny_tokenizer, tmp_path, architecture, options):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, **options)
    result = result_of(source, tmp_path / "out", "fold_norms")
    torch.testing.assert_close(logits(result), load_dense(source).model(IDS).logits, rtol=0, atol=1e-4)
    found = StreamedModel(result)
    ones = {name: bool((found.read(name) == 1).all()) for name in found.stored if name.endswith("norm.weight")}
    inner = [name for name in ones if "layernorm" in name]
    assert len(inner) == 4
    assert all(ones[name] for name in inner)
    # A head that shares the embedding keeps its norm.
    assert ones["model.norm.weight"] == ("lm_head.weight" not in found.tied)


def test_compress_with_it_from_end_to_end(examples, tiny_tokenizer, tmp_path, capsys):
    source = saved(tiny_tokenizer, tmp_path / "model")
    options = ["--transforms", "fold_norms", "--method", "rtn", "--core-dtype", "int8", "--threads", "1"]
    assert main(["plan", source.name, *options, "--no-benchmark"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"transform fold_norms@1 holds \S+ MB, writes \S+ MB to the work folder", shown)
    out = tmp_path / "out"
    assert main(["compress", source.name, "-o", str(out), *options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    record = json.loads((out / "halfplate.json").read_text())
    assert record["recipe"]["transforms"] == summary["recipe"]["transforms"] == ["fold_norms@1"]
    assert record["identity"]["plugins"] == {"transform fold_norms": "halfplate-extensions 1.0"}
    assert all("fold_norms@1" in (out / name).read_text() for name in ("report.html", "README.md"))
    # The norms, which are not compressed, are those of the transform, too.
    stored = load_file(out / "model.safetensors")
    assert all(bool((tensor == 1).all()) for name, tensor in stored.items() if name.endswith("norm.weight"))
    expected = load_dense(source).model(IDS).logits
    with torch.no_grad():
        found = halfplate.load(out, kernels=False)(IDS).logits
    assert float((found - expected).norm() / expected.norm()) < 0.02
    plain = compress(source.name, tmp_path / "plain", Recipe(**INT8, threads=1))
    assert summary["check"]["kl"] < max(2 * plain["check"]["kl"], 1e-3)
    assert summary["fingerprint"] != plain["fingerprint"]
    assert "transforms" not in json.loads((tmp_path / "plain" / "halfplate.json").read_text())["recipe"]


@pytest.mark.slow
def test_the_kl_is_to_the_model_before_its_transforms(faulty, tiny_folder, tmp_path):
    faulty("yield name, tensor * 3 if name == 'lm_head.weight' else tensor")
    plain = compress(str(tiny_folder), tmp_path / "plain", Recipe(**INT8, threads=1))
    other = compress(str(tiny_folder), tmp_path / "out", Recipe(transforms=["faulty"], **INT8, threads=1))
    assert other["check"]["kl"] > 0.05 > 10 * plain["check"]["kl"]


def test_the_plan_counts_each_transform(examples, narrow, tiny_folder):
    plan = halfplate.plan(tiny_folder, transforms=["fold_norms", "narrow"], method="magnitude")
    folded, cut = plan.transforms
    assert [step.label for step in plan.transforms] == ["fold_norms@1", "narrow@1"]
    layer = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)
    outer = 4 * (2 * 320 * 32 + 32)
    assert folded.disk == 2 * layer + outer
    assert cut.disk == folded.disk - 2 * 4 * 3 * 32 * 16
    assert folded.memory == cut.memory == 2 * 4 * 320 * 32
    assert plan.disk.transformed == folded.disk + cut.disk
    assert plan.memory.phases["transforming"] - plan.memory.phases["reading"] == folded.memory - 6 * 320 * 32
    assert plan.specs["model.layers.0.mlp.up_proj"].d_out == 32
    assert halfplate.plan(tiny_folder, method="magnitude").memory.phases.keys() == plan.memory.phases.keys() - {
        "transforming"
    }


@pytest.mark.parametrize(
    "options",
    [
        {"tune_block": 2},
        {"ratios": "owl", "pattern": "4:8"},
        {"budget": 0.6, "search": "evolution", "generations": 1, "offspring": 2},
    ],
    ids=["tuned", "ratios", "budget"],
)
def test_a_smaller_model_is_planned_compressed_and_loaded_as_such(narrow, tiny_folder, tmp_path, options):
    recipe = Recipe(method="magnitude", transforms=["narrow"], **options, **SMALL)
    compress(str(tiny_folder), tmp_path / "out", recipe)
    model = halfplate.load(tmp_path / "out", kernels=False)
    assert model.config.intermediate_size == 32
    assert model.get_submodule("model.layers.1.mlp.down_proj").in_features == 32
    assert model(IDS).logits.isfinite().all()


def test_transforms_are_applied_in_order_and_after_the_conversion(examples, narrow, tiny_tokenizer, tmp_path):
    model = build_model("llama", vocab_size=len(tiny_tokenizer))
    write_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", half=False)
    source = open_source(str(tmp_path / "model.gguf"))
    plan = plan_source(source, Recipe(transforms=["fold_norms", "narrow"], **INT8))
    assert [(step.label, step.automatic) for step in plan.transforms] == [
        ("conversion@2", True),
        ("fold_norms@1", False),
        ("narrow@1", False),
    ]
    original, result = transformed(source, plan.transforms, plan.recipe, WorkFolder(tmp_path / "out"), silent)
    torch.testing.assert_close(logits(original), model(IDS).logits, rtol=0, atol=0)
    found, state = StreamedModel(result), model.state_dict()
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(found.read(up), (state[up] * state[norm])[:32])
    other = plan_source(source, Recipe(transforms=["narrow", "fold_norms"], **INT8))
    assert other.fingerprint != plan.fingerprint
    kept = sorted(path.parent.name for path in WorkFolder(tmp_path / "out").path.rglob("*.safetensors"))
    assert kept == ["0"] * 3 + ["1"] * 3 + ["2"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "after"), [("transforming", 9), ("compressing", 3)])
def test_the_same_bytes_after_a_break_anywhere(examples, tiny_folder, tmp_path, phase, after):
    recipe, out = Recipe(transforms=["fold_norms"], method="magnitude", **SMALL), tmp_path / "out"
    compress(str(tiny_folder), tmp_path / "whole", recipe, check=False)
    with pytest.raises(Killed):
        compress(str(tiny_folder), out, recipe, report=killing(phase, after), check=False)
    kept = {path: path.stat().st_mtime_ns for path in (WorkFolder(out).path / "transforms").rglob("*.safetensors")}
    assert len(kept) == (1 if phase == "transforming" else 3)

    def seen(at, done, total, note="", share=None, facts=NO_FACTS):
        if at == "compressing":
            assert {path: path.stat().st_mtime_ns for path in kept} == kept

    compress(str(tiny_folder), out, recipe, report=seen, resume=True, check=False)
    assert digests(out) == digests(tmp_path / "whole")
    assert not WorkFolder(out).path.exists()


@pytest.mark.slow
def test_other_transforms_are_refused_when_a_run_is_resumed(examples, narrow, tiny_folder, tmp_path):
    recipe, out = Recipe(transforms=["fold_norms"], **INT8, **SMALL), tmp_path / "out"
    with pytest.raises(Killed):
        compress(str(tiny_folder), out, recipe, report=killing("compressing", 3))
    for names, spoken in (([], "None"), (["narrow"], r"\['narrow@1'\]")):
        other = Recipe(transforms=names, **INT8, **SMALL)
        with pytest.raises(HalfplateError, match=rf"transforms was \['fold_norms@1'\] when .* and is {spoken} now"):
            compress(str(tiny_folder), out, other, resume=True)
    compress(str(tiny_folder), out, recipe, resume=True, check=False)
    with pytest.raises(HalfplateError, match=r"transforms was \['fold_norms@1'\] when .* was made"):
        compress(str(tiny_folder), out, Recipe(**INT8, **SMALL), resume=True)


def test_another_version_makes_another_plan(install, tiny_folder, monkeypatch):
    install("narrowing", points=[(GROUP, "narrow = narrow_module:NARROW")], narrow_module=NARROW)
    first = halfplate.plan(tiny_folder, transforms=["narrow"], seq_len=16)
    from narrow_module import Narrow

    monkeypatch.setattr(Narrow, "version", 2)
    second = halfplate.plan(tiny_folder, transforms=["narrow"], seq_len=16)
    assert (first.recipe.transforms, second.recipe.transforms) == (("narrow@1",), ("narrow@2",))
    assert first.fingerprint != second.fingerprint
    # A recipe of the older version says which it means.
    with pytest.raises(HalfplateError, match="transforms='narrow@1': the installed narrow is version 2"):
        Recipe.from_mapping(first.recipe.to_json())


def refused(capsys, *words):
    capsys.readouterr()  # the progress of saving a model
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[0]


def test_bad_input_is_one_line_before_any_work(examples, tiny_folder, tiny_tokenizer, tmp_path, capsys):
    out, folder = tmp_path / "out", tmp_path / "gemma"
    saved(tiny_tokenizer, folder, "gemma2")
    compress_with = ("compress", tiny_folder, "-o", out, "--transforms")
    error = refused(capsys, *compress_with, "fold_norm")
    assert "transforms='fold_norm' is unknown; did you mean 'fold_norms'? available: conversion, rotate, " in error
    assert "the installed fold_norms is version 1" in refused(capsys, *compress_with, "fold_norms@7")
    error = refused(capsys, "compress", folder, "-o", out, "--transforms", "fold_norms")
    assert re.search(r"transforms='fold_norms@1' does not support '.*gemma': it is a gemma2 model, expected", error)
    error = refused(capsys, *compress_with, "conversion")
    assert "transforms='conversion@2' does not support" in error
    assert "its tensors are in the form of the model already" in error
    with pytest.raises(HalfplateError, match="transforms='fold_norms' is not of the right type; expected a list"):
        Recipe(transforms="fold_norms")
    assert not out.exists()
    assert not WorkFolder(out).path.exists()


def test_a_narrow_model_is_not_made_narrow_again(narrow, tiny_folder):
    """The second transform sees what the first will make, before anything is made."""
    with pytest.raises(HalfplateError, match="its MLPs have no more than 32 neurons"):
        halfplate.plan(tiny_folder, transforms=["narrow", "narrow"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("yield name, tensor[:3]", r"the result of the transform faulty@1: .* has shape \(3.*from its configuration"),
        ("yield from [(name, tensor)] * 2", "faulty@1 returned the tensor .*, which is unexpected or a duplicate"),
        ("yield name + 'x', tensor", r"faulty@1 returned the tensor \S+x, which is unexpected or a duplicate"),
        ("if 'norm' not in name: yield name, tensor", "faulty@1 lacks 2 tensors of its configuration"),
        ("yield name, 1 / 0", r"faulty@1 cannot be made \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_what_a_transform_does_wrong_is_one_line(faulty, tiny_folder, tmp_path, body, reason):
    faulty(body)
    with pytest.raises(HalfplateError, match=reason) as found:
        result_of(open_source(str(tiny_folder)), tmp_path / "out", "faulty")
    assert "\n" not in str(found.value)


def test_a_transform_that_fails_while_planning_is_one_line(faulty, tiny_folder):
    faulty(refusal="return source.config.no_such_size")
    with pytest.raises(HalfplateError, match=r"transforms='faulty@1' failed while planning .*no_such_size"):
        halfplate.plan(tiny_folder, transforms=["faulty"])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("FAULTY = 3", "is a int, expected an instance of halfplate.transforms.Transform"),
        (NARROW + "FAULTY = NARROW", "calls itself 'narrow'"),
        (NARROW + "del Narrow.version\nFAULTY = NARROW", "lacks version"),
    ],
)
def test_a_broken_package_is_one_line(install, code, reason):
    install("faults", "2.1", points=[(GROUP, "faulty = faulty_module:FAULTY")], faulty_module=code)
    with pytest.raises(HalfplateError, match=re.escape(f"transforms='faulty' of faults 2.1 {reason}")):
        Recipe(transforms=["faulty"])


@pytest.mark.slow
def test_a_model_that_is_being_loaded_cannot_become_smaller(narrow, tiny_folder):
    from transformers import AutoModelForCausalLM

    config = halfplate.HalfplateConfig(recipe={"method": "magnitude", "transforms": ["narrow"]})
    with pytest.raises(HalfplateError, match=r"its transforms make .* of shape .*; run `halfplate compress`"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config)


def test_the_command_of_a_report_names_them(examples, install):
    from halfplate.report.command import compress_command

    command = compress_command("model", "out", Recipe(transforms=["fold_norms"]))
    assert command == "halfplate compress model -o out --pattern=2:4 --transforms=fold_norms@1"
    assert installed(GROUP)["fold_norms"]
