"""The model card says what the folder holds, and nothing that was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfplate.checkpoint.read import inspect_checkpoint
from halfplate.checkpoint.write import amend_record
from halfplate.exports import export
from halfplate.models.licence import licence_of
from halfplate.models.sources import open_source


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_method_bytes_and_what_was_not_measured(written: Any) -> None:
    one = written()
    found = inspect_checkpoint(one.folder)
    data, body = card(one.folder)
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["halfplate", "magnitude"]
    assert f"{found['nbytes']:,} | {found['dense_nbytes']:,}" in body
    assert f"{found['other_nbytes']:,}" in body
    assert "KL to the original model, perplexity, tasks | not measured" in body
    assert "| 0.25 |" in body
    assert "import halfplate" in body
    assert "name no licence" in body
    assert "license" not in data


def test_names_from_elsewhere_stay_on_their_line(written: Any) -> None:
    one = written()
    one.record |= {
        "model": "org/`odd` | name\n# no heading",
        "base_model": "org/name",
        "license": "apache-2.0\nextra: field",
    }
    one.write(one.folder, overwrite=True)
    data, body = card(one.folder)
    assert (data["base_model"], data["license"]) == ("org/name", "apache-2.0 extra: field")
    assert "extra" not in data
    assert [line for line in body.splitlines() if line.startswith("# ")] == [
        "# 'odd' | name # no heading, compressed by Halfplate"
    ]
    assert "| base model | `'odd' \\| name # no heading` |" in body


def test_what_was_measured_comes_with_its_protocol(written: Any) -> None:
    one = written()
    measures = {"kl": 0.125, "perplexity": float("inf"), "tokens": 1234, "protocol": {"source": "self", "seed": 7}}
    amend_record(one.folder, {"held_out": measures})
    _, body = card(one.folder)
    assert "KL to the original model, nats per token | 0.125" in body
    assert "| perplexity | not finite |" in body
    assert "| tokens scored | 1,234 |" in body
    assert "source self, seed 7" in body
    assert json.loads((one.folder / "halfplate.json").read_text())["held_out"]["perplexity"] is None
    assert inspect_checkpoint(one.folder, verify=True)["verified"]


def test_a_dense_copy_says_that_it_is_one(written: Any, tmp_path: Path) -> None:
    one = written()
    one.record |= {"model": "some/where/bird", "license": "mit"}
    one.write(one.folder, overwrite=True)
    export(one.folder, tmp_path / "dense")
    data, body = card(tmp_path / "dense")
    assert data["license"] == "mit"
    assert body.strip().startswith("# bird, an uncompressed copy")
    assert "import halfplate" not in body


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Bird", "apache-2.0"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("# Bird\nlicense: mit\n", None),
        ("text\n---\nlicense: mit\n---\n", None),
        ("\udc80", None),
    ],
)
def test_the_licence_stands_in_the_front_of_a_card(tiny_folder: Path, text: str, expected: str | None) -> None:
    (tiny_folder / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert licence_of(open_source(str(tiny_folder))) == expected
