import json
import subprocess
import sys

import pytest

from halfplate.formats.quantizers import QUANTIZERS
from halfplate.kernels import native


def test_plan_writes_and_computes_nothing(halfplate, tiny_folder, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    outcome = halfplate("plan", tiny_folder, "--method", "magnitude", "--exclude", "*.0.*.q_proj")
    assert outcome.status == 0
    assert "excluded by" in outcome.out
    assert "model.layers.0.self_attn.k_proj" in outcome.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_plan_says_which_wish_a_recipe_serves(halfplate, tiny_folder):
    for options, wish in (
        (["--method", "magnitude"], "speed (float weights)"),
        (["--core-dtype", "int4"], "speed; at the same bytes"),
        (["--method", "rtn", "--core-dtype", "int4"], "size; for speed"),
        (["--budget", "0.6"], "within the budget"),
    ):
        assert wish in halfplate("plan", tiny_folder, "--seq-len", "32", *options).out


def test_plan_json(halfplate, tiny_folder):
    plan = halfplate("plan", tiny_folder, "--method", "magnitude", "--exclude", "*.q_proj", "--json").json()
    skipped = [matrix for matrix in plan["matrices"] if matrix["skipped"]]
    assert len(skipped) == 2
    assert all(matrix["reason"] and matrix["method"] is None for matrix in skipped)


def test_plan_of_a_missing_model(halfplate):
    halfplate("plan", "./nowhere", "--method", "magnitude").refused("model='./nowhere'", "does not exist")


def test_inspect(halfplate, checkpoint):
    found = halfplate("inspect", checkpoint, "--json").json()
    keys = {"name", "format", "shape", "nbytes", "dense_nbytes", "relative_error"}
    assert len(found["matrices"]) == 14
    assert all(keys <= matrix.keys() for matrix in found["matrices"])
    table = halfplate("inspect", checkpoint)
    assert "model.layers.1.mlp.down_proj" in table.out
    assert "all checksums are correct" in halfplate("inspect", checkpoint, "--verify").out


def test_inspect_refuses(halfplate, checkpoint, tiny_folder, tmp_path):
    halfplate("inspect", tiny_folder).refused("tiny_llama")
    halfplate("inspect", tmp_path / "none").refused("none")
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    halfplate("inspect", checkpoint, "--verify").refused("checksum")


def test_export_gives_a_plain_model(halfplate, checkpoint, tmp_path):
    dense = tmp_path / "dense"
    outcome = halfplate("export", checkpoint, "--format", "dense", "-o", dense)
    assert (outcome.status, outcome.out) == (0, "")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    halfplate("export", checkpoint, "-o", dense).refused("out=", "--overwrite")
    assert halfplate("export", checkpoint, "-o", dense, "--overwrite").status == 0
    halfplate("export", checkpoint, "-o", checkpoint, "--overwrite").refused("holds the model that is read")
    halfplate("export", tmp_path / "none", "-o", tmp_path / "x").refused("none")
    halfplate("export", checkpoint, "--format", "onnx", "-o", tmp_path / "x").refused("onnx", "dense")


def test_generate_continues_alike_from_checkpoint_and_export(halfplate, checkpoint, tmp_path, tiny_folder):
    assert halfplate("export", checkpoint, "-o", tmp_path / "dense").status == 0
    texts = [
        halfplate("generate", model, "One day", "--max-new-tokens", "5") for model in (checkpoint, tmp_path / "dense")
    ]
    assert texts[0].out == texts[1].out
    assert texts[0].out.startswith("One day")
    assert texts[0].err == ""
    assert halfplate("generate", tiny_folder, "One day", "--max-new-tokens", "3", "--threads", "1").status == 0


def test_generate_refuses(halfplate, tiny_folder):
    halfplate("generate", tiny_folder, "x", "--max-new-tokens", "500").refused("max_new_tokens=500", "128 positions")
    halfplate("generate", tiny_folder, "x " * 200, "--max-new-tokens", "5").refused("a shorter prompt")
    halfplate("generate", tiny_folder, "x", "--chat").refused("--chat needs a chat template")
    halfplate("generate", tiny_folder, "x", "--max-new-tokens", "0").refused("--max-new-tokens", "at least 1")


@pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
def test_generate_keeps_prompts_and_drafts_with_the_same_text(halfplate, checkpoint, tmp_path, tiny_folder):
    cache, command = tmp_path / "prompt", ("generate", checkpoint, "--max-new-tokens", "20")
    for prompt in ("One day a small bird", "One day a small bird sat in", "One day a ball"):
        plain = halfplate(*command, prompt)
        assert plain.status == 0
        kept = halfplate(*command, prompt, "--prompt-cache", cache)
        assert (kept.status, kept.out, kept.err) == (0, plain.out, "")
        assert halfplate(*command, prompt, "--prompt-cache", cache, "--lookup", "7").out == plain.out
    # The tiny model has heads of 8 numbers.
    halfplate(*command, "One day", "--cache-dtype", "int8").refused("cache_dtype='int8'", "no multiple of 16")
    halfplate(*command, "One day", "--prompt-cache", tmp_path).refused("--prompt-cache", "not a regular file")
    halfplate(*command, "One day", "--lookup", "0").refused("--lookup", "at least 1")
    halfplate("generate", tiny_folder, "One day", "--prompt-cache", cache).refused("cannot be used with this model")


def test_generate_chat(halfplate, tiny_folder):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    (tiny_folder / "chat_template.jinja").write_text(template)
    outcome = halfplate("generate", tiny_folder, "hello", "--chat", "--max-new-tokens", "4")
    assert outcome.status == 0
    assert "hello" not in outcome.out


def test_eval_of_a_text(halfplate, checkpoint, tiny_folder, text_file):
    options = ("--text", text_file, "--seq-len", "32", "--windows", "3", "--json")
    result = halfplate("eval", checkpoint, "--against", tiny_folder, *options).json()
    assert (result["windows"], result["seq_len"], result["tokens"]) == (3, 32, 3 * 31)
    assert result["kl"] > 0
    assert 0 <= result["top1_agreement"] <= 1
    dense = halfplate("eval", tiny_folder, *options).json()
    assert "kl" not in dense
    assert dense["perplexity"] == pytest.approx(result["dense_perplexity"], rel=1e-5)


def test_eval_ends_in_a_verdict(halfplate, checkpoint, tiny_folder, text_file):
    options = ("--text", text_file, "--seq-len", "32", "--windows", "2")
    found = halfplate("eval", checkpoint, "--against", tiny_folder, *options, "--json").json()["verdict"]
    *_, figures, verdict = halfplate("eval", checkpoint, "--against", tiny_folder, *options).out.splitlines()
    assert (figures, verdict) == (f"quality, 62 tokens: {found['figures']}", f"verdict: {found['sentence']}")
    same = halfplate("eval", checkpoint, "--against", checkpoint, *options, "--json").json()["verdict"]
    assert (same["grade"], same["advice"]) == ("nearly indistinguishable", [])
    assert "verdict:" not in halfplate("eval", checkpoint, *options).out


def test_eval_of_a_model_against_itself(halfplate, checkpoint, text_file):
    options = ("--text", text_file, "--seq-len", "32", "--windows", "2", "--json")
    result = halfplate("eval", checkpoint, "--against", checkpoint, *options).json()
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["top1_agreement"] == 1


def test_eval_of_several_texts(halfplate, checkpoint, tiny_folder, text_file, tmp_path):
    other = tmp_path / "again.txt"
    other.write_text(text_file.read_text()[500:])
    options = ("--text", text_file, other, "--seq-len", "32", "--windows", "2", "--against", tiny_folder, "--json")
    result = halfplate("eval", checkpoint, *options).json()
    parts = result["texts"]
    assert parts.keys() == {"story", "again"}
    assert result["tokens"] == sum(part["tokens"] for part in parts.values())
    assert result["kl"] == pytest.approx((parts["story"]["kl"] + parts["again"]["kl"]) / 2)
    assert result["perplexity"] == pytest.approx((parts["story"]["perplexity"] * parts["again"]["perplexity"]) ** 0.5)
    assert "again" in halfplate("eval", checkpoint, *options[:-1]).out


def test_eval_without_a_text_samples_it(halfplate, checkpoint, tiny_folder):
    options = ("--seq-len", "16", "--windows", "2")
    result = halfplate("eval", checkpoint, "--against", tiny_folder, *options, "--json").json()
    assert result["protocol"]["source"] == "self"
    calibration = json.loads((checkpoint / "halfplate.json").read_text())["calibration"]
    assert result["protocol"]["seed"] != calibration["seed"]
    # The dense model is judged on the same text.
    dense = halfplate("eval", tiny_folder, *options, "--json").json()
    assert dense["protocol"]["sha256"] == result["protocol"]["sha256"]
    assert "seed" in halfplate("eval", tiny_folder, *options).out


def test_eval_refuses(halfplate, checkpoint, tiny_folder, tiny_model, tmp_path, text_file):
    halfplate("eval", checkpoint).refused("--text FILE or --against ORIGINAL")
    halfplate("eval", checkpoint, "--text", "none.txt").refused("text='none.txt' does not exist")
    halfplate("eval", tiny_folder, "--text", text_file, "--seq-len", "4096").refused("seq_len=4096", "128")
    short = tmp_path / "short.txt"
    short.write_text("One day")
    assert halfplate("eval", tiny_folder, "--text", short, "--seq-len", "64").status == 2
    other = tmp_path / "other"
    tiny_model(vocab_size=64).save_pretrained(other)
    (tiny_folder / "tokenizer.json").rename(other / "tokenizer.json")
    (tiny_folder / "tokenizer_config.json").rename(other / "tokenizer_config.json")
    halfplate("eval", checkpoint, "--text", text_file, "--against", other).refused("against=", "vocabulary")


def test_methods(halfplate):
    found = halfplate("methods", "--json").json()
    listed, cores = found["methods"], {core["name"]: core["bits"] for core in found["core_dtypes"]}
    assert list(cores) == list(QUANTIZERS)
    assert (cores["int4"]["32"], cores["nl4k"]["32"], cores["affine4k"]["32"]) == (4.5, 4.25, 4.5)
    assert [method["name"] for method in listed] == [
        "magnitude",
        "wanda",
        "ria",
        "nowag",
        "sparsegpt",
        "armor",
        "rtn",
        "slim",
        "gptq",
        "denoiserotator",
        "svd",
        "bitstack",
        "rocket",
        "cospadi",
        "monarch",
        "gqsa",
    ]
    assert next(m for m in listed if m["name"] == "sparsegpt")["options"]["damping"] == 0.01
    assert next(m for m in listed if m["name"] == "armor")["wrapped"] is True
    assert "wanda" in halfplate("methods").out


def test_doctor(halfplate):
    found = halfplate("doctor", "--json").json()
    assert {"python", "torch", "transformers", "threads", "cpu_features", "native_kernels", "gpu"} <= found.keys()
    assert found["native_kernels"] or found["native_reason"]
    assert "native kernels" in halfplate("doctor").out


@pytest.mark.slow
def test_doctor_says_why_there_are_no_kernels():
    code = "import sys; from halfplate.cli import main; sys.exit(main(['doctor']))"
    environment = {"HALFPLATE_NATIVE": "0"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0
    assert "HALFPLATE_NATIVE=0" in done.stdout


def test_recipe(halfplate, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("method: wanda\nsamples: 3\n")
    assert "valid" in halfplate("recipe", "validate", path).out
    shown = tmp_path / "shown.yaml"
    shown.write_text(halfplate("recipe", "show", path).out)
    assert halfplate("recipe", "show", shown).out == shown.read_text()
    path.write_text("metod: wanda\n")
    halfplate("recipe", "validate", path).refused("did you mean 'method'")
    assert halfplate("recipe", "show", "default").status == 0
