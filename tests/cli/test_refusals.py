"""Bad input that is easy to overlook: one line, exit status 2, before any work and with nothing written."""

import json

import pytest
from safetensors.torch import load_file, save_file

QUICK = ("--samples", "4", "--seq-len", "32", "--threads", "1")


@pytest.mark.parametrize("verb", ["plan", "compress"])
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ("--pattern", "20:32", "--block-size", "32", "--seq-len", "32"),
            ("pattern=20:32 keeps more than 16 of a group", "16:32"),
        ),
        (("--calibration", "missing.txt"), ("calibration='missing.txt' does not exist",)),
        (("--seq-len", "4000"), ("seq_len=4000 exceeds the 128 positions",)),
    ],
)
def test_plan_refuses_what_compress_refuses(halfplate, tiny_folder, tmp_path, verb, options, parts):
    out = tmp_path / "out"
    place = ("-o", out) if verb == "compress" else ()
    halfplate(verb, tiny_folder, *place, *options).refused(*parts)
    assert not out.exists()


def test_a_device_without_values(halfplate, tiny_folder, tmp_path):
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--device", "meta", *QUICK)
    outcome.refused("device='meta' stores no values")


@pytest.mark.parametrize("out", ["a" * 300, ".", ".."])
def test_places_that_cannot_be_written_to(halfplate, tiny_folder, tmp_path, monkeypatch, out):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    halfplate("compress", tiny_folder, "-o", out, *QUICK).refused("out=", "choose another folder")
    assert [path.name for path in (tmp_path / "here").rglob("*")] == ["below"]


def test_empty_names(halfplate, tiny_folder, tmp_path):
    halfplate("compress", "", "-o", tmp_path / "out", *QUICK).refused("model='' is empty")
    halfplate("compress", tiny_folder, "-o", "", *QUICK).refused("out='.'", "current folder")


def test_half_a_surrogate_pair_is_no_text(halfplate, tiny_folder, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + '\n{"text": "\\ud800 and more"}\n')
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--calibration", file, *QUICK)
    outcome.refused("line 2", "not valid Unicode")


def test_a_learning_rate_that_diverges_is_named(halfplate, tiny_folder, tmp_path):
    options = ("--solver", "paper", "--iterations", "60", "--block-size", "8", "--option", "learning_rate=1e30")
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *options, *QUICK)
    outcome.refused("learning_rate=1e+30", "diverge")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["armor", "wanda", "sparsegpt", "nowag"])
@pytest.mark.parametrize("which", ["all", "one"])
def test_huge_weights_give_finite_numbers(halfplate, tiny_folder, tmp_path, method, which):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    weight = tensors["model.layers.0.self_attn.o_proj.weight"]
    if which == "all":
        weight *= 1e25
    else:
        weight[0, 0] = 1e25
    save_file(tensors, path, metadata={"format": "pt"})
    # Only the huge matrix: what follows it in the model would overflow whatever the method.
    options = ("--include", "model.layers.0.self_attn.o_proj", "--json", *QUICK)
    outcome = halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--method", method, *options)
    assert outcome.status == 0, outcome.err
    assert 0 <= outcome.json()["mean_relative_error"] <= 1
