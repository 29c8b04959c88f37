"""--ratios: each block's N of M in the plan, the checkpoint and the record; the bytes stay."""

import json

import pytest

from halfplate.checkpoint.config import read_specs
from halfplate.errors import HalfplateError
from halfplate.recipe import Recipe

QUICK = ("--samples", "4", "--seq-len", "32", "--threads", "1", "--pattern", "4:8", "--ratios", "owl")


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_blocks_keep_unequal_shares_of_equal_bytes(halfplate, tiny_folder, tmp_path, method):
    out = tmp_path / "out"
    plan = halfplate("plan", tiny_folder, "--method", method, *QUICK, "--json").json()
    done = halfplate("compress", tiny_folder, "-o", out, "--method", method, *QUICK, "--owl-lambda", "0.2", "--json")
    assert done.status == 0, done.err
    summary = done.json()
    patterns = {ratio["block"]: ratio["format"] for ratio in summary["ratios"]}
    shares = {ratio["block"]: ratio["score"] for ratio in summary["ratios"]}
    # Two blocks of equal size: what one keeps more the other keeps less, by 0.2 · 8 rounded.
    less, more = sorted(shares, key=shares.__getitem__)
    assert [patterns[less], patterns[more]] == ["2:8", "6:8"] or [patterns[less], patterns[more]] == ["3:8", "5:8"]
    for name, spec in read_specs(out).items():
        assert str(spec.pattern) == patterns[int(name.split(".")[2])], name
    specs = read_specs(out).values()
    assert sum(spec.d_out * spec.pattern.kept(spec.d_in) for spec in specs) == plan["dense_nbytes"] / 4
    rows = sum(spec.d_out for spec in specs)  # the positions of each of which start on a byte
    assert abs(summary["nbytes"] - plan["nbytes"]) < rows
    assert json.loads((out / "halfplate.json").read_text())["ratios"] == summary["ratios"]
    assert halfplate("inspect", out, "--verify").status == 0


@pytest.mark.parametrize("ratios", ["farms", "essential"])
def test_other_rules_choose_n_of_m(halfplate, tiny_folder, tmp_path, ratios):
    options = [*QUICK[:-1], ratios, "--method", "magnitude"]
    done = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *options, "--owl-lambda", "0.2", "--json")
    assert done.status == 0, done.err
    summary = done.json()
    patterns = {ratio["block"]: int(ratio["format"].partition(":")[0]) for ratio in summary["ratios"]}
    assert sum(patterns.values()) == 8
    scores = {ratio["block"]: ratio["score"] for ratio in summary["ratios"]}
    if ratios == "farms":
        assert set(patterns.values()) in ({2, 6}, {3, 5})
        assert patterns[max(scores, key=scores.get)] < 4
        assert "knee" not in summary
    else:
        assert sum(scores.values()) == pytest.approx(1)
        knee = summary["knee"]
        assert len(knee["losses"]) == len(knee["sparsities"]) == 9
        assert knee["losses"][-1] != knee["dense"]
    again = halfplate(
        "compress", tiny_folder, "-o", tmp_path / "out", *options, "--owl-lambda", "0.2", "--resume", "--json"
    )
    assert again.json()["ratios"] == summary["ratios"]


@pytest.mark.parametrize("ratios", ["owl", "farms"])
def test_bits_of_layers_add_up_to_those_of_the_recipe(halfplate, tiny_folder, tmp_path, ratios):
    options = ["--samples", "4", "--seq-len", "32", "--threads", "1", "--ratios", ratios, "--method", "rtn"]
    options += ["--pattern", "dense", "--core-dtype", "nl4", "--group-size", "32", "--owl-lambda", "0.1"]
    done = halfplate("compress", tiny_folder, "-o", tmp_path / "out", *options, "--json")
    assert done.status == 0, done.err
    found = {ratio["block"]: ratio["format"] for ratio in done.json()["ratios"]}
    assert sorted(found.values()) == ["nl3", "nl5"]
    for name, spec in read_specs(tmp_path / "out").items():
        assert spec.core_dtype == found[int(name.split(".")[2])], name
    planned = halfplate("plan", tiny_folder, *options, "--json").json()
    assert done.json()["nbytes"] == planned["nbytes"]
    assert halfplate("inspect", tmp_path / "out", "--verify").status == 0


@pytest.mark.slow
def test_the_tables_say_what_was_kept(halfplate, tiny_folder, tmp_path):
    planned = halfplate("plan", tiny_folder, "--method", "magnitude", *QUICK)
    assert "chosen in the run" in planned.out
    done = halfplate("compress", tiny_folder, "-o", tmp_path / "out", "--method", "magnitude", *QUICK, "--quiet")
    assert "kept by layer" in done.out
    plain = halfplate("compress", tiny_folder, "-o", tmp_path / "plain", "--method", "magnitude", "--quiet")
    assert "kept by layer" not in plain.out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"ratios": "besa"}, "ratios='besa' is unknown; available: uniform, owl, farms, essential"),
        ({"ratios": "owl", "budget": 0.5}, "ratios='owl' and a budget both choose"),
        (
            {"ratios": "owl", "method": "rtn", "core_dtype": "nl4s"},
            "ratios='owl' spreads N of M or bits .* core_dtype='nl4s' with pattern dense",
        ),
        ({"ratios": "essential", "method": "rtn", "core_dtype": "int4"}, "ratios='essential' counts weights"),
        (
            {"ratios": "farms", "method": "rtn", "core_dtype": "int4", "types": ["*down_proj=int8"]},
            "ratios='farms' with types=.*down_proj=int8: both choose",
        ),
        ({"ratios": "owl", "pattern": "16:32", "block_size": 32}, "pattern=20:32|keeps more than 16"),
        ({"owl_lambda": -0.1}, "owl_lambda=-0.1 must be a fraction"),
        ({"owl_lambda": float("nan")}, "owl_lambda=nan must be a fraction"),
    ],
)
def test_what_cannot_be_is_refused(options, complaint):
    with pytest.raises(HalfplateError, match=complaint) as raised:
        Recipe(**options)
    assert "\n" not in str(raised.value)
