"""Every command that reads a model reads one that another tool quantised, our own exports among them."""

from __future__ import annotations

import pytest

from conftest import build_model
from halfplate.exports import export

# A model whose other tensors fp16 holds, so that an export rounds nothing.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
SMALL = ("--samples", "4", "--seq-len", "32")
FORMATS = ("gptq", "compressed-tensors")


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory):
    """The original, its checkpoint in int4, and its exports by format."""
    import halfplate

    folder = tmp_path_factory.mktemp("bridges")
    model = build_model("llama", vocab_size=len(tiny_tokenizer), **SIZES)
    model.half().save_pretrained(folder / "original")
    tiny_tokenizer.save_pretrained(folder / "original")
    fields = {"method": "rtn", "pattern": "dense", "block_size": 0, "core_dtype": "int4", "group_size": 32}
    halfplate.compress(str(folder / "original"), folder / "int4", benchmark=False, threads=1, **fields)
    for format in FORMATS:
        export(folder / "int4", folder / format, format)
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_the_checkpoint_it_was_made_of(format, made, halfplate, text_file):
    arguments = ("--text", text_file, "--seq-len", "32", "--windows", "4", "--json")
    found = halfplate("eval", made / format, "--against", made / "int4", *arguments)
    assert found.status == 0, found.err
    assert found.json()["kl"] == pytest.approx(0, abs=1e-9)
    assert found.json()["top1_agreement"] == 1
    other = halfplate("eval", made / "int4", "--against", made / format, "--activations", "float", *arguments).json()
    assert other["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_compressed_again_loses_next_to_nothing(format, made, halfplate, tmp_path):
    plan = halfplate("plan", made / format, "--method", "rtn", "--core-dtype", "int4", "--group-size", "32")
    assert f"codes of {format}: 14 matrices are decoded to floats when they are read" in " ".join(plan.out.split())
    options = ("--method", "rtn", "--core-dtype", "int4", "--group-size", "32", "--json")
    found = halfplate("compress", made / format, "-o", tmp_path / "again", *options)
    assert found.status == 0, found.err
    assert found.json()["mean_relative_error"] < 1e-3
    assert "14 matrices are decoded" in " ".join(found.json()["notes"])
    assert f"codes of {format}" in (tmp_path / "again" / "README.md").read_text()


def test_every_command_that_reads_a_model(made, halfplate, text_file, tmp_path):
    codes, short = made / "gptq", ("--text", text_file, "--seq-len", "32", "--windows", "2")
    calls = (
        ("eval", codes, *short),
        ("bench", codes, "--new-tokens", "4", "--prompt", "8", "--rounds", "1"),
        ("generate", codes, "Once", "--max-new-tokens", "4"),
        ("sample", codes, "-o", tmp_path / "said.jsonl", "--samples", "2", "--seq-len", "8"),
        ("export", codes, "-o", tmp_path / "floats"),
        ("compress", codes, "-o", tmp_path / "small", "--method", "wanda", *SMALL, "--max-kl", "50"),
        ("report", tmp_path / "small", "--against", codes, *short, "--new-tokens", "2"),
        (
            "recover",
            tmp_path / "small",
            "--teacher",
            codes,
            "-o",
            tmp_path / "better",
            "--tokens",
            "128",
            "--text",
            text_file,
            "--seq-len",
            "32",
        ),
    )
    for call in calls:
        found = halfplate(*call)
        assert found.status == 0, (call, found.err)
