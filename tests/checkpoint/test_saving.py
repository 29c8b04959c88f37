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
from halfplate.errors import HalfplateError
from halfplate.runtime import restore


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_casts_what_was_dense_too(written: Any, dtype: torch.dtype) -> None:
    one = written("qwen2", other_dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float16)
    buffers = {name: tensor.dtype for name, tensor in loaded.named_buffers() if "inv_freq" in name}
    dense = loaded.dequantize(dtype=dtype)
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype} == {dense.dtype}
    assert {name: tensor.dtype for name, tensor in dense.named_buffers()} == buffers
    torch.testing.assert_close(
        dense(torch.arange(3, 20)[None]).logits.float(), one.model(torch.arange(3, 20)[None]).logits, rtol=0.1, atol=0.1
    )


def test_the_last_files_saved_are_the_ones_read(written: Any, tmp_path: Path) -> None:
    """A folder that is saved to twice, in shards and in one file, holds the second model and no rest of the first."""
    folder = written().folder
    first, second = load(folder, kernels=False), load(folder, kernels=False)
    second.model.norm.weight.data.mul_(2)
    for number, sizes in enumerate((("1GB", "20KB"), ("20KB", "1GB"))):
        folder = tmp_path / str(number)
        first.save_pretrained(folder, max_shard_size=sizes[0])
        second.save_pretrained(folder, max_shard_size=sizes[1])
        inspect_checkpoint(folder, verify=True)
        assert torch.equal(load(folder, kernels=False).model.norm.weight, second.model.norm.weight)
        assert (folder / "model.safetensors").exists() != (folder / "model.safetensors.index.json").exists()


def test_only_the_main_process_writes(written: Any, tmp_path: Path) -> None:
    load(written().folder).save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").glob("*.json"))


def test_what_cannot_be_saved_is_refused_before_anything_is_written(written: Any, tmp_path: Path) -> None:
    one = written()
    model = load(one.folder, kernels=False)
    with pytest.raises(HalfplateError, match="variant='v1'"):
        model.save_pretrained(tmp_path / "saved", variant="v1")
    (tmp_path / "file").touch()
    with pytest.raises(HalfplateError, match="is a file; choose a folder"):
        model.save_pretrained(tmp_path / "file")
    name = next(iter(one.specs))
    model.set_submodule(name, torch.nn.Linear(32, 32))
    with pytest.raises(HalfplateError, match=f"{name} is a Linear, no longer a compressed matrix"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_tokens_are_added_after_restoring(written: Any, tmp_path: Path) -> None:
    model = load(written().folder)
    with pytest.raises(HalfplateError, match=r"halfplate\.runtime\.restore"):
        model.lm_head.weight.float()
    restore(model)
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path / "larger")
    assert load(tmp_path / "larger")(torch.tensor([[1, 325]])).logits.shape == (1, 2, 330)


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
