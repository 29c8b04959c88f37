import os
import re
import shlex
from pathlib import Path

import pytest

import halfplate as package
from halfplate.evaluation import speed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"
QUICK = ("--prompt", "8", "--new-tokens", "4", "--rounds", "1", "--threads", "1")
FIGURES = {"decode_tokens_per_s", "prefill_tokens_per_s", "weight_bytes", "peak_rss_bytes"}


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch):
    monkeypatch.setattr(speed, "PROBE_BYTES", 2**20)


def test_bench_json(halfplate, checkpoint, tiny_folder):
    result = halfplate("bench", checkpoint, "--against", tiny_folder, *QUICK, "--json").json()
    assert FIGURES | {"dense", "decode_speedup", "prefill_speedup"} <= result.keys()
    assert result["dense"].keys() >= FIGURES
    assert all(result[key] > 0 and result["dense"][key] > 0 for key in FIGURES - {"peak_rss_bytes"})
    assert result["linear_bytes"] < result["dense"]["dtypes"]["fp32"]["linear_bytes"]
    # One round: the median of paired ratios is the ratio.
    decode = result["decode_tokens_per_s"] / result["dense"]["decode_tokens_per_s"]
    assert result["decode_speedup"] == pytest.approx(decode)


def test_bench_of_all_loops(halfplate, checkpoint, tiny_folder):
    result = halfplate("bench", checkpoint, "--against", tiny_folder, *QUICK, "--loops", "--json").json()
    assert result["loops"].keys() == {"generate", "dense_same_loop"}
    assert result["weights_speedup"] > 0


def test_bench_table(halfplate, checkpoint, tiny_folder):
    outcome = halfplate("bench", checkpoint, "--against", tiny_folder, *QUICK)
    assert outcome.status == 0, outcome.err
    for part in ("halfplate", "original fp32", "original bf16", "decode:", "prefill:", "memory read bandwidth", "load"):
        assert part in outcome.out


def test_bench_of_a_dense_model(halfplate, tiny_folder):
    result = halfplate("bench", tiny_folder, *QUICK, "--json").json()
    assert result.keys() >= FIGURES
    assert result["dtype"] in ("fp32", "bf16")
    assert "dense" not in result
    outcome = halfplate("bench", tiny_folder, *QUICK)
    assert f"dense {result['dtype']}, generate" in outcome.out or "dense" in outcome.out


def test_bench_warns_of_a_busy_machine(halfplate, tiny_folder, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    outcome = halfplate("bench", tiny_folder, *QUICK, "--json", "--quiet")
    assert outcome.json()["load_average"] == 1000
    assert outcome.err.startswith("halfplate: warning: load 1000.0")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert halfplate("bench", tiny_folder, *QUICK, "--json", "--quiet").err == ""


def test_bench_refuses(halfplate, checkpoint, tiny_folder, tiny_model, tmp_path):
    halfplate("bench", tiny_folder, "--new-tokens", "1").refused("--new-tokens 1")
    halfplate("bench", tiny_folder, "--rounds", "0").refused("--rounds", "at least 1")
    halfplate("bench", tiny_folder, "--head-dtype", "int4").refused("--head-dtype", "int4")
    halfplate("bench", tiny_folder, "--activations", "int8").refused("activations='int8'", "Halfplate checkpoints")
    halfplate("bench", tiny_folder, "--prompt", "4096").refused("prompt=4096", "128 positions")
    halfplate("bench", tmp_path / "none").refused("none", "does not exist")
    other = tmp_path / "other"
    tiny_model(vocab_size=9, eos_token_id=2).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((tiny_folder / name).read_bytes())
    halfplate("bench", checkpoint, "--against", other, *QUICK).refused("against=", "the same vocabulary")


def test_bench_is_a_verb_of_the_package():
    assert package.bench.__module__ == "halfplate.evaluation.bench"


@pytest.mark.slow
def test_commands_of_the_page_run(halfplate, checkpoint, tiny_folder, tmp_path, monkeypatch):
    checkpoint.rename(tmp_path / "SmolLM2-2of4")
    tiny_folder.rename(tmp_path / "SmolLM2")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\$ halfplate (.*)", PAGE.read_text(), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        outcome = halfplate(*shlex.split(line), *QUICK)
        assert outcome.status == 0, outcome.err


def test_page_explains_every_key(halfplate, checkpoint, tiny_folder):
    result = halfplate("bench", checkpoint, "--against", tiny_folder, *QUICK, "--loops", "--json").json()
    options = {"model", "against", "prompt", "new_tokens", "rounds", "activations", "head_dtype"}
    assert {key for key in result if f"`{key}`" not in PAGE.read_text()} <= options
