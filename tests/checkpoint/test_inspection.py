from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfplate.checkpoint.read import inspect_checkpoint, load
from halfplate.errors import HalfplateError


def test_the_contract(written: Any) -> None:
    one = written("qwen2", max_shard_nbytes=20_000)
    found = inspect_checkpoint(one.folder, verify=True)
    assert {matrix["name"] for matrix in found["matrices"]} == set(one.specs)
    for matrix in found["matrices"]:
        spec = one.specs[matrix["name"]]
        assert matrix == {
            "name": matrix["name"],
            "format": spec.format,
            "pattern": str(spec.pattern),
            "core_dtype": spec.core_dtype,
            "shape": [spec.d_out, spec.d_in],
            "nbytes": spec.nbytes,
            "dense_nbytes": 2 * spec.d_out * spec.d_in,
            "in_shared": None,
            "relative_error": 0.25,
            "tokens": None,
        }
    assert found["nbytes"] == sum(one.model.get_submodule(name).matrix.nbytes for name in one.specs)
    assert found["dense_nbytes"] == sum(spec.dense_nbytes for spec in one.specs.values())
    stored = [tensor for file in one.folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert found["nbytes"] + found["other_nbytes"] == sum(tensor.nbytes for tensor in stored)
    json.dumps(found)


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight_in_blocks"],
)
def test_verify_names_the_damaged_tensor(written: Any, name: str) -> None:
    one = written()
    tensors = load_file(one.folder / "model.safetensors")
    tensors[name].view(torch.uint8).flatten()[-1] ^= 1
    save_file(tensors, one.folder / "model.safetensors", metadata={"format": "pt"})
    inspect_checkpoint(one.folder)
    with pytest.raises(HalfplateError, match=rf"{name} in model.safetensors does not have the checksum"):
        inspect_checkpoint(one.folder, verify=True)


def test_verify_checks_positions_even_where_the_checksum_fits(written: Any) -> None:
    from halfplate.storage.tensor_file import sha256

    one = written()
    name = "model.layers.0.self_attn.q_proj.weight_index"
    tensors = load_file(one.folder / "model.safetensors")
    tensors[name][0, 0] = 0
    save_file(tensors, one.folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((one.folder / "halfplate.json").read_text())
    record["tensors"][name] = sha256(tensors[name])
    (one.folder / "halfplate.json").write_text(json.dumps(record))
    with pytest.raises(HalfplateError, match=rf"{name} holds positions"):
        inspect_checkpoint(one.folder, verify=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda record: record.update(format_version=2),
            r"format_version=2 .* is newer than this halfplate supports \(1\)",
        ),
        (lambda record: record.pop("format_version"), "format_version=None"),
        (lambda record: record.pop("tensors"), "has no checksums"),
        (lambda record: record["tensors"].pop("model.norm.weight"), r"model\.norm\.weight has no checksum"),
        (lambda record: record["tensors"].update(more="0"), "more is missing"),
    ],
)
def test_records_that_cannot_be_verified(written: Any, change: Any, complaint: str) -> None:
    one = written()
    record = json.loads((one.folder / "halfplate.json").read_text())
    change(record)
    (one.folder / "halfplate.json").write_text(json.dumps(record))
    with pytest.raises(HalfplateError, match=complaint):
        inspect_checkpoint(one.folder, verify=True)


def test_a_folder_without_its_record_cannot_be_verified(written: Any, tmp_path: Any) -> None:
    one = written()
    load(one.folder).save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "halfplate.json").unlink()
    assert {matrix["relative_error"] for matrix in inspect_checkpoint(tmp_path / "again")["matrices"]} == {None}
    with pytest.raises(HalfplateError, match=r"halfplate\.json' does not exist"):
        inspect_checkpoint(tmp_path / "again", verify=True)


@pytest.mark.parametrize("matrices", [None, 7, [], {"model.layers.0.mlp.up_proj": 3}])
def test_strange_records_do_no_harm(written: Any, matrices: Any) -> None:
    one = written()
    record = json.loads((one.folder / "halfplate.json").read_text())
    (one.folder / "halfplate.json").write_text(json.dumps(record | {"matrices": matrices}))
    assert {matrix["relative_error"] for matrix in inspect_checkpoint(one.folder)["matrices"]} == {None}
