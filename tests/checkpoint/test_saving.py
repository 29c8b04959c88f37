"""`save_pretrained` of a loaded model writes a whole checkpoint again."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfplate.checkpoint.config import SENTENCE
from halfplate.checkpoint.read import inspect_checkpoint, load


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_saved_model_is_a_whole_checkpoint(written: Any, logits_of: Any, tmp_path: Path, shard: str) -> None:
    one = written()
    loaded = AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float32, low_cpu_mem_usage=True)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shard)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (one.folder, tmp_path / "again"))
    assert after["quantization_config"] == before["quantization_config"]
    assert after["transformers_weights"] == SENTENCE
    assert inspect_checkpoint(tmp_path / "again", verify=True)["matrices"] == inspect_checkpoint(one.folder)["matrices"]
    record = json.loads((tmp_path / "again" / "halfplate.json").read_text())
    assert record["recipe"] == {"method": "magnitude"}
    assert (tmp_path / "again" / "README.md").read_text().startswith("---\n")
    assert torch.equal(logits_of(load(tmp_path / "again")), one.logits())


def test_copies_and_pickles_save_themselves_and_the_collector_frees_them(written: Any) -> None:
    loaded = load(written().folder)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert other.save_pretrained._model is other
    gone = ref(loaded)
    del loaded
    gc.collect()
    assert gone() is None


def test_dequantize_gives_a_plain_model(written: Any, tmp_path: Path) -> None:
    one = written("qwen2")
    dense = load(one.folder).dequantize()
    assert all(type(dense.get_submodule(name)).__name__ == "Linear" for name in one.specs)
    torch.testing.assert_close(dense(torch.arange(3, 20)[None]).logits, one.model(torch.arange(3, 20)[None]).logits)
    dense.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "halfplate.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_pushing_uploads_the_whole_folder(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any) -> None:
            uploaded["token"] = token

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
            uploaded.update(options, repo_id=repo_id, files={path.name for path in folder_path.iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = load(written().folder)
    model.save_pretrained(tmp_path / "bird", push_to_hub=True, commit_message="first")
    assert (uploaded["repo_id"], uploaded["commit_message"], uploaded["token"]) == ("me/bird", "first", None)
    assert {"config.json", "model.safetensors", "halfplate.json", "README.md"} <= uploaded["files"]
