import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from halfplate.cli import main
from halfplate.errors import HalfplateError
from halfplate.methods import METHODS
from halfplate.methods.magnitude import Magnitude
from halfplate.planning import make_plan
from halfplate.planning.memory import memory_bound
from halfplate.recipe import Recipe


@dataclass(frozen=True)
class Wrapped(Magnitude):
    name: ClassVar[str] = "wrapped"
    wrapped: ClassVar[bool] = True


@pytest.fixture
def wrapped(monkeypatch):
    monkeypatch.setitem(METHODS.own, "wrapped", f"{__name__}:Wrapped")
    return "wrapped"


def test_every_linear_of_the_blocks_is_planned(tiny_folder):
    plan = make_plan(str(tiny_folder), Recipe(method="magnitude"))
    assert len(plan.matrices) == 2 * 7
    assert all(not matrix.skipped for matrix in plan.matrices)
    # Of 4 bytes for two weights, 2:4 keeps one bf16 value and half of a 4-bit index.
    assert plan.nbytes == sum(
        d_out * d_in + d_out * d_in // 8 for d_out, d_in in (matrix.shape for matrix in plan.matrices)
    )
    assert plan.dense_nbytes == sum(2 * matrix.shape[0] * matrix.shape[1] for matrix in plan.matrices)
    assert plan.source_nbytes == (tiny_folder / "model.safetensors").stat().st_size


def test_json_keys(tiny_folder):
    plan = json.loads(json.dumps(make_plan(str(tiny_folder), Recipe(method="magnitude")).to_json()))
    assert {"matrices", "nbytes", "dense_nbytes", "other_nbytes", "source_nbytes", "fingerprint"} <= plan.keys()
    expected = {"name", "format", "shape", "nbytes", "dense_nbytes", "method", "skipped", "reason"}
    expected |= {"pattern", "core_dtype", "flops", "memory_bytes", "seconds"}
    assert all(matrix.keys() == expected for matrix in plan["matrices"])


@pytest.mark.parametrize(
    ("options", "bytes_a_weight", "name"),
    [
        ({"method": "magnitude", "core_dtype": "int8"}, 0.5 + 0.125, "nm"),
        ({"method": "magnitude", "core_dtype": "int4"}, 0.25 + 0.125, "nm"),
        ({"method": "rtn", "core_dtype": "int8"}, 1.0, "dense"),
        ({"method": "rtn", "core_dtype": "int4"}, 0.5, "dense"),
    ],
)
def test_codes_are_counted_with_their_scales(tiny_folder, options, bytes_a_weight, name):
    plan = make_plan(str(tiny_folder), Recipe(**options))
    assert {matrix.to_json()["format"] for matrix in plan.matrices} == {name}
    assert {matrix.to_json()["core_dtype"] for matrix in plan.matrices} == {options["core_dtype"]}
    # No matrix is wider than 128, so each row has one scale.
    assert plan.nbytes == sum(
        round(d_out * d_in * bytes_a_weight) + 2 * d_out for d_out, d_in in (matrix.shape for matrix in plan.matrices)
    )


def test_a_budget_says_what_the_matrices_take_at_most(tiny_folder, capsys):
    plain, bytes_, time = (
        make_plan(str(tiny_folder), Recipe(seq_len=32, **options))
        for options in ({}, {"budget": 0.9}, {"time_budget": 0.9})
    )
    assert plain.to_json()["nbytes_at_most"] == plain.nbytes
    assert bytes_.to_json()["nbytes_at_most"] == int(0.9 * plain.dense_nbytes)
    assert time.to_json()["nbytes_at_most"] is None
    assert bytes_.disk.result - plain.disk.result == max(0, int(0.9 * plain.dense_nbytes) - plain.nbytes)
    assert time.disk.result - plain.disk.result == max(0, plain.dense_nbytes - plain.nbytes)
    assert main(["plan", str(tiny_folder), "--seq-len", "32", "--budget", "0.9", "--no-benchmark"]) == 0
    assert "(90.0%); the run chooses the format of each matrix" in " ".join(capsys.readouterr().out.split())


def test_other_bytes_count_tied_tensors_once(tiny_folder, tmp_path, tiny_model):
    untied = make_plan(str(tiny_folder), Recipe(method="magnitude"))
    folder = tmp_path / "tied"
    tiny_model(vocab_size=320, tie_word_embeddings=True).save_pretrained(folder)
    tied = make_plan(str(folder), Recipe(method="magnitude"))
    assert untied.other_nbytes - tied.other_nbytes == 320 * 32 * 4


def test_matrices_that_do_not_fit_are_skipped_with_a_reason(tiny_folder):
    # hidden 32 is no multiple of 24, ffn 48 is.
    plan = make_plan(str(tiny_folder), Recipe(method="magnitude", pattern="12:24"))
    assert {matrix.name.rpartition(".")[2] for matrix in plan.matrices if not matrix.skipped} == {"down_proj"}
    reasons = {matrix.reason for matrix in plan.matrices if matrix.skipped}
    assert reasons == {"d_in=32 is not a multiple of M=24 (pattern 12:24)"}
    with pytest.raises(HalfplateError, match="M=5 divides no d_in"):
        make_plan(str(tiny_folder), Recipe(method="magnitude", pattern="2:5"))


def test_excluded_matrices_stay_dense_and_count_elsewhere(tiny_folder):
    whole = make_plan(str(tiny_folder), Recipe(method="magnitude"))
    part = make_plan(str(tiny_folder), Recipe(method="magnitude", exclude=("*.q_proj",)))
    skipped = [matrix for matrix in part.matrices if matrix.skipped]
    assert [matrix.shape for matrix in skipped] == [(32, 32)] * 2
    assert part.other_nbytes - whole.other_nbytes == 2 * 32 * 32 * 4


@pytest.mark.parametrize(("sizes", "block"), [((32, 48), 8), ((640, 640), 16), ((1280, 1280), 32)])
def test_auto_block_stays_within_five_percent(tmp_path, tiny_model, wrapped, sizes, block):
    hidden, ffn = sizes
    folder = tmp_path / "model"
    tiny_model(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_key_value_heads=4,
        num_hidden_layers=1,
        head_dim=hidden // 4,
        vocab_size=8,
    ).save_pretrained(folder)
    plan = make_plan(str(folder), Recipe(method=wrapped))
    assert plan.block_size == block
    # Each square matrix (d, d) has two wrappers of d·b.
    if hidden == ffn:
        assert plan.wrapper_share == pytest.approx(2 * block / hidden)
    assert plan.wrapper_share <= 0.05 or block == 8


@pytest.mark.parametrize("block", [0, 1, 16])
def test_block_size_that_is_given(tiny_folder, wrapped, block):
    plan = make_plan(str(tiny_folder), Recipe(method=wrapped, block_size=block))
    assert {(spec.out_block, spec.in_block) for spec in plan.specs.values()} == {(block, block)}


def test_auto_blocks_are_multiples_of_m(tmp_path, tiny_model, wrapped):
    folder = tmp_path / "model"
    tiny_model(
        hidden_size=768, intermediate_size=768, num_key_value_heads=4, num_hidden_layers=1, head_dim=192, vocab_size=8
    ).save_pretrained(folder)
    assert make_plan(str(folder), Recipe(method=wrapped, pattern="1:3")).block_size == 15


def test_block_that_straddles_groups_is_refused(wrapped):
    with pytest.raises(HalfplateError, match=r"block_size=6 is not a multiple of M=4 \(pattern 2:4\); try 4 or 8"):
        Recipe(method=wrapped, block_size=6)


def test_fingerprint_tells_recipes_and_models_apart(tiny_folder, tmp_path, tiny_model):
    first = make_plan(str(tiny_folder), Recipe(method="magnitude"))
    assert make_plan(str(tiny_folder), Recipe(method="magnitude", threads=1)).fingerprint == first.fingerprint
    assert make_plan(str(tiny_folder), Recipe(method="magnitude", seed=1)).fingerprint != first.fingerprint
    folder = tmp_path / "other"
    tiny_model(vocab_size=320, intermediate_size=64).save_pretrained(folder)
    assert make_plan(str(folder), Recipe(method="magnitude")).fingerprint != first.fingerprint


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_share_of_the_decoder_is_told_and_warned_of(tmp_path, tiny_model, tiny_tokenizer, capsys, architecture):
    model = tiny_model(architecture, vocab_size=len(tiny_tokenizer), num_local_experts=8)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    few = architecture == "mixtral"
    without = ("*.experts.*",) if few else ()
    plan = make_plan(str(tmp_path), Recipe(method="magnitude", exclude=without))
    inside = sum(parameter.numel() for parameter in model.model.layers.parameters())
    taken = sum(model.get_submodule(name).weight.numel() for name in plan.specs)
    assert plan.decoder_share == pytest.approx(taken / inside)
    found = plan.to_json()
    assert found["decoder_share"] == plan.decoder_share
    assert (plan.decoder_share < 0.5) == few
    assert [warning.partition(";")[0] for warning in found["warnings"]] == (
        [f"only {plan.decoder_share:.1%} of the decoder's parameters will be compressed"] if few else []
    )
    excluding = [argument for pattern in without for argument in ("--exclude", pattern)]
    assert main(["plan", str(tmp_path), "--method", "magnitude", "--no-benchmark", *excluding]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "share of the decoder that is compressed" in text
    assert ("warning" in text) == few


def test_the_plan_tells_how_experts_are_solved(tmp_path, tiny_model, tiny_tokenizer):
    model = tiny_model("mixtral", vocab_size=len(tiny_tokenizer), num_local_experts=8, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    plan = make_plan(str(tmp_path), Recipe(method="sparsegpt", samples=4, seq_len=16))
    assert plan.decoder_share > 0.9
    assert plan.warnings == []
    assert plan.experts == {
        "layers": 2,
        "per_layer": 8,
        "per_token": 2,
        "at_once": 1,
        "passes": 8,
        "recorded_bytes": 4 * 4 * 16 * 2 * (32 + 2),
        "gram_bytes": 2 * 8 * (32**2 + 48**2),
    }
    # The Gram matrices of all experts are never held together.
    more = replace(plan.sizes, experts=replace(plan.sizes.experts, experts=800))
    assert memory_bound(more, plan.job) == plan.memory.bound
