import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfplate.evaluation.verdict import DAMAGED
from halfplate.methods.wanda import Wanda

WANDA = ("--method", "wanda", "--samples", "4", "--seq-len", "32", "--threads", "1")


def leftovers(folder, *known):
    """Whatever a run left beside the files that were there."""
    return {path.name for path in folder.iterdir()} - set(known)


def test_json_alone_on_standard_output(halfplate, tiny_folder, tmp_path, text_file):
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA, "--calibration", text_file, "--json")
    assert outcome.status == 0
    summary = outcome.json()
    assert summary["method"] == "wanda"
    assert len(summary["matrices"]) == 14
    assert all(
        0 < matrix["relative_error"] < 1 and matrix["error_kind"] == "diagonal" for matrix in summary["matrices"]
    )
    assert summary["calibration"]["tokens"] == 128
    assert summary["seconds"]["total"] > 0
    assert "compressing: 14/14" in outcome.err


def test_quiet_table(halfplate, tiny_folder, tmp_path):
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--method", "magnitude", "--quiet")
    assert (outcome.status, outcome.err) == (0, "")
    assert "matrices, compressed" in outcome.out
    assert "\x1b" not in outcome.out


@pytest.mark.slow
def test_the_self_check_is_said_or_left_out(halfplate, tiny_folder, tmp_path, monkeypatch):
    command = ("compress", tiny_folder, "--method", "magnitude", "--quiet", "-o")
    *_, figures, verdict = halfplate(*command, tmp_path / "one").out.splitlines()
    assert re.fullmatch(
        r"quality, 127 tokens of built-in text: KL [\d.e+-]+ nats per token, top-1 agreement [\d.]+%, perplexity .* \(original .*\)",
        figures,
    )
    assert verdict.startswith("verdict: ")
    monkeypatch.setattr("halfplate.evaluation.verdict.grade_of", lambda kl: DAMAGED)
    *_, verdict = halfplate(*command, tmp_path / "two").out.splitlines()
    assert verdict.startswith("verdict: damaged. ")
    assert f"halfplate recover {tmp_path / 'two'} --teacher {tiny_folder}" in verdict
    monkeypatch.setattr("halfplate.compression.compress.self_check", None)
    outcome = halfplate(*command, tmp_path / "three", "--no-check")
    assert outcome.status == 0
    assert outcome.out.splitlines()[-1].startswith("quality: not measured; halfplate eval ")


@pytest.mark.parametrize(
    ("method", "core"),
    [
        *((method, []) for method in ("magnitude", "wanda", "ria", "nowag", "sparsegpt", "armor")),
        ("wanda", ["--core-dtype", "int8"]),
        ("armor", ["--core-dtype", "int4", "--wrapper-dtype", "int8"]),
        ("rtn", ["--core-dtype", "int4"]),
        ("gptq", ["--core-dtype", "int3"]),
        ("gptq", ["--core-dtype", "int4", "--group-size", "32"]),
        ("ria", ["--option", "permute=true"]),
        ("rtn", ["--core-dtype", "int8", "--pattern", "dense"]),
    ],
)
def test_plan_foretells_the_bytes(halfplate, tiny_folder, tmp_path, text_file, method, core):
    out = tmp_path / "out"
    options = [
        "--method",
        method,
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--calibration",
        text_file,
        "--exclude",
        "*.k_proj",
        *core,
    ]
    if method == "armor":
        options += ["--block-size", "16", "--iterations", "2"]
    plan = halfplate("plan", tiny_folder, *options, "--json").json()
    done = halfplate("compress", tiny_folder, "-o", out, *options, "--json")
    assert done.status == 0, done.err
    summary, found = done.json(), halfplate("inspect", out, "--json", "--verify").json()
    for key in ("nbytes", "dense_nbytes", "other_nbytes"):
        assert plan[key] == summary[key] == found[key], key
    assert summary["fingerprint"] == plan["fingerprint"]
    planned = [(m["name"], m["format"], m["shape"], m["nbytes"]) for m in plan["matrices"] if not m["skipped"]]
    assert sorted(planned) == sorted((m["name"], m["format"], m["shape"], m["nbytes"]) for m in found["matrices"])
    errors = {m["name"]: m["relative_error"] for m in summary["matrices"]}
    assert {m["name"]: m["relative_error"] for m in found["matrices"]} == errors
    assert len([m for m in plan["matrices"] if m["skipped"]]) == 2


@pytest.mark.slow
def test_same_seed_same_bytes(halfplate, tiny_folder, tmp_path):
    def digest(seed, name):
        out = tmp_path / name
        assert halfplate("compress", tiny_folder, "-o", out, *WANDA, "--seed", seed).status == 0
        return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(), (
            out / "halfplate.json"
        ).read_bytes()

    first = digest(3, "a")
    assert digest(3, "b") == first
    assert digest(4, "c") != first


def test_recipe_file_and_flags(halfplate, tiny_folder, tmp_path, text_file):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: sparsegpt\nsamples: 2\nseq_len: 16\ncalibration: {text_file}\nmethod_options: {{damping: 0.1}}\n"
    )
    out = tmp_path / "out"
    options = ("--recipe", recipe, "--samples", "3", "--option", "column_block=8")
    summary = halfplate("compress", tiny_folder, "-o", out, *options, "--json").json()
    assert summary["recipe"]["method_options"] == {"damping": 0.1, "column_block": 8}
    assert (summary["calibration"]["samples"], summary["calibration"]["seq_len"]) == (3, 16)
    # Equal results have equal records, also of recipes that leave out what there was not before.
    without_effect = {"threads", "max_kl", "transforms", "keep", "embedding_dtype", "head_dtype"}
    without_effect |= {"fit", "fit_ram", "context", "target", "effort", "types"}
    stored = {key: value for key, value in summary["recipe"].items() if key not in without_effect}
    assert json.loads((out / "halfplate.json").read_text())["recipe"] == stored


@pytest.mark.slow
def test_max_kl(halfplate, tiny_folder, tmp_path):
    out = tmp_path / "out"
    good = halfplate("compress", tiny_folder, "-o", out, *WANDA, "--max-kl", "100", "--json")
    assert good.status == 0, good.err
    assert 0 < good.json()["held_out"]["kl"] < 100
    ruined = halfplate("compress", tiny_folder, "-o", out, *WANDA, "--max-kl", "1e-9", "--overwrite")
    ruined.refused("max_kl=1e-09", "exceeds it; the checkpoint is kept at", str(out), status=1)
    assert halfplate("inspect", out, "--verify").status == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method", "wnda"], ["method='wnda'", "did you mean 'wanda'"]),
        (["--pattern", "2:5"], ["pattern=2:5", "M=5"]),
        (["--pattern", "x"], ["pattern='x'", "2:4"]),
        (["--block-size", "16"], ["block_size=16", "armor"]),
        (["--calibration", "none.txt"], ["calibration='none.txt'", "does not exist"]),
        (["--samples", "100000"], ["samples=100000", "longer text"]),
        (["--seq-len", "4096"], ["seq_len=4096", "128"]),
        (["--include", "*.nothing"], ["include='*.nothing'"]),
        (["--option", "damping"], ["KEY=VALUE"]),
        (["--option", "damping=1"], ["damping='1' is not an option of method 'wanda'"]),
        (["--iterations", "3"], ["iterations='3' is not an option"]),
        (["--device", "tpu9"], ["device='tpu9'"]),
        (["--recipe", "none.yaml"], ["recipe='none.yaml' cannot be read"]),
        (["--max-kl", "-1"], ["max_kl=-1.0"]),
    ],
)
def test_bad_options(halfplate, tiny_folder, tmp_path, text_file, options, parts):
    before = {path.name for path in tmp_path.iterdir()}
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA, "--calibration", text_file, *options)
    outcome.refused(*parts)
    assert not leftovers(tmp_path, *before)


@pytest.mark.parametrize(("block", "cure"), [("6", "try 4 or 8"), ("-3", "0 (no wrappers)"), ("big", "auto")])
def test_block_size_that_cannot_work(halfplate, tiny_folder, tmp_path, block, cure):
    halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--method", "armor", "--block-size", block).refused(
        "block_size=", block, cure
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(halfplate, tiny_folder, tmp_path):
    halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA, "--device", "cuda").refused(
        "device='cuda'", "--device cpu"
    )


def test_models_that_cannot_be_compressed(halfplate, tiny_folder, tmp_path, checkpoint):
    out = tmp_path / "out"
    halfplate("compress", tmp_path / "none", "-o", out, *WANDA).refused("does not exist")
    halfplate("compress", checkpoint, "-o", out, *WANDA).refused("already compressed")
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(
        json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]})
    )
    halfplate("compress", tiny_folder, "-o", out, *WANDA).refused("not a causal language model")
    assert not out.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(halfplate, tiny_folder, tmp_path, value):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA).refused("model.layers.1.mlp.up_proj.weight", "1")
    assert not (tmp_path / "out").exists()


def test_weight_file_cut_short(halfplate, tiny_folder, tmp_path):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA).refused("model.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "nowag", "sparsegpt", "armor"])
def test_dead_rows_columns_and_inputs_give_no_nan(halfplate, tiny_folder, tmp_path, method):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.weight"][4:9] = 0
    tensors["model.layers.0.self_attn.q_proj.weight"][:, 8:17] = 0
    tensors["model.layers.0.input_layernorm.weight"][:] = 0  # no input of q, k, v has a second moment
    tensors["model.layers.1.mlp.gate_proj.weight"][:] = 0  # nor has any input of down_proj, and a whole matrix is 0
    save_file(tensors, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    done = halfplate("compress", tiny_folder, "-o", out, *WANDA, "--method", method, "--json")
    assert done.status == 0, done.err
    assert all(0 <= matrix["relative_error"] <= 1.01 for matrix in done.json()["matrices"])
    for name, tensor in load_file(out / "model.safetensors").items():
        assert tensor.isfinite().all(), name


def test_core_type_that_overflows(halfplate, tiny_folder, tmp_path):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    outcome = halfplate(
        "compress", tiny_folder, "-o", tmp_path / "out", "--method", "magnitude", "--core-dtype", "fp16"
    )
    outcome.refused("model.layers.0.mlp.up_proj", "core_dtype='fp16'", "bf16")
    assert not (tmp_path / "out").exists()


def test_existing_out_is_refused_before_any_work(halfplate, tiny_folder, tmp_path, checkpoint, monkeypatch):
    def never(*args):
        raise AssertionError("work was done")

    before = (checkpoint / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("halfplate.compression.compress.load_dense", never)
        halfplate("compress", tiny_folder, "-o", checkpoint, *WANDA).refused("out=", "--overwrite")
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        (stranger / "diary.txt").write_text("mine")
        halfplate("compress", tiny_folder, "-o", stranger, *WANDA, "--overwrite").refused("out=", "did not write")
        halfplate("compress", tiny_folder, "-o", stranger / "diary.txt", *WANDA, "--overwrite").refused("not a folder")
        halfplate("compress", tiny_folder, "-o", stranger / "diary.txt" / "x", *WANDA).refused("not a folder")
        halfplate("compress", tiny_folder, "-o", tiny_folder, *WANDA, "--overwrite").refused(
            "holds the model that is read"
        )
        halfplate("compress", tiny_folder, "-o", tmp_path, *WANDA, "--overwrite").refused(
            "holds the model that is read"
        )
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert halfplate("compress", tiny_folder, "-o", checkpoint, *WANDA, "--seed", "9", "--overwrite").status == 0
    assert (checkpoint / "model.safetensors").read_bytes() != before


def test_interrupt_leaves_nothing(halfplate, tiny_folder, tmp_path, text_file, monkeypatch):
    original, solved = Wanda.compress, []

    def interrupted(self, *args):
        solved.append(1)
        if len(solved) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Wanda, "compress", interrupted)
    before = {path.name for path in tmp_path.iterdir()}
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA, "--calibration", text_file)
    assert outcome.status == 1
    said = outcome.err.splitlines()[-1]
    assert said.startswith("halfplate: interrupted; ")
    assert "has no partial result" in said
    assert said.endswith("run the same command with --resume to continue")
    assert leftovers(tmp_path, *before) == {"out.log.jsonl", ".out.compress"}
    monkeypatch.setattr(Wanda, "compress", original)
    again = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA, "--calibration", text_file, "--resume")
    assert again.status == 0, again.err
    assert leftovers(tmp_path, *before) == {"out"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_of_a_real_process(tiny_folder, tmp_path, sent):
    before = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "halfplate", "compress", str(tiny_folder), "-o", str(tmp_path / "out")]
    command += ["--method", "wanda", "--samples", "4096", "--seq-len", "128", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        first = process.stderr.readline()
        time.sleep(0.3)
        process.send_signal(sent)
        out, rest = process.communicate(timeout=60)
    assert first.startswith("reading"), first + rest
    assert (process.returncode, out) == (1, "")
    assert rest.splitlines()[-1].startswith("halfplate: interrupted")
    assert not leftovers(tmp_path, *before)


@pytest.mark.slow
def test_log_levels(halfplate, tiny_folder, tmp_path):
    def said(*options):
        outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *WANDA, "--overwrite", *options)
        assert outcome.status == 0, outcome.err
        return outcome.err

    assert said("--log-level", "warning") == said("--log-level", "error") == said("--quiet") == ""
    assert '"event": "matrix"' not in said("--log-level", "info")
    lines = [json.loads(line) for line in said("--log-level", "debug").splitlines() if line.startswith("{")]
    assert len([line for line in lines if line["event"] == "matrix"]) == 14
    assert halfplate("compress", tiny_folder, "-o", tmp_path / "x", "--log-level", "loud").status == 2
