"""`halfplate sample`: text of a model in a file that other commands read."""

import json

import pytest

from halfplate.calibration import read_text
from halfplate.cli import main


def test_sampled_text_can_be_calibrated_on(tiny_folder, tmp_path, capsys):
    out = tmp_path / "texts" / "own.jsonl"
    words = ["sample", str(tiny_folder), "-o", str(out), "--samples", "6", "--seq-len", "24", "--quiet"]
    assert main([*words, "--json"]) == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert protocol["source"] == "self"
    assert protocol["decoded_by"]
    texts = read_text(str(out))
    assert len(texts) == 6
    assert main([*words, "--overwrite"]) == 0
    assert read_text(str(out)) == texts, "the same text for the same seed"
    assert main([*words, "--overwrite", "--seed", "1"]) == 0
    assert read_text(str(out)) != texts
    run = ["compress", str(tiny_folder), "-o", str(tmp_path / "out"), "--calibration", str(out), "--method", "wanda"]
    assert main([*run, "--samples", "4", "--seq-len", "16", "--quiet"]) == 0


@pytest.mark.parametrize(("name", "message"), [("own.txt", "is not a .jsonl file"), ("there.jsonl", "exists")])
def test_other_files_are_refused_before_any_work(tiny_folder, tmp_path, capsys, name, message):
    (tmp_path / "there.jsonl").write_text("{}")
    assert main(["sample", str(tiny_folder), "-o", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.jsonl").read_text() == "{}"
