from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.exports import export

LOAD_WITHOUT_HALFPLATE = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "halfplate":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch, transformers
model, report = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
tensors = torch.load(sys.argv[2])
assert tokenizer(tensors["text"])["input_ids"] == tensors["input_ids"]
with torch.no_grad():
    tensors["dense"] = model(tensors["ids"]).logits
assert model.generate(tensors["ids"], max_new_tokens=2).shape[1] == tensors["ids"].shape[1] + 2
torch.save(tensors, sys.argv[2])
"""


@pytest.mark.slow
def test_transformers_alone_loads_the_export(written: Any, tmp_path: Path) -> None:
    one = written("qwen2", other_dtype=torch.float32)
    export(one.folder, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & config.keys()
    assert config["dtype"] == "float32"

    ids = torch.tensor([[1, 5, 7, 11]])
    with torch.no_grad():
        expected = one.model(ids).logits
    text = "a small bird"
    exchange = tmp_path / "exchange.pt"
    torch.save({"ids": ids, "text": text, "input_ids": one.tokenizer(text)["input_ids"]}, exchange)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_HALFPLATE, str(tmp_path / "dense"), str(exchange)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(exchange)["dense"], expected, rtol=1e-4, atol=1e-4)


def test_an_export_in_bf16_differs_by_its_rounding_only(
    written: Any, logits_of: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    one = written("llama", other_dtype=torch.bfloat16)
    export(one.folder, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits_of(dense), one.logits(), rtol=0.05, atol=0.05)


def test_exported_weights_are_the_products(written: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    one = written(other_dtype=torch.float16)
    export(one.folder, tmp_path / "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    for name in one.specs:
        assert torch.equal(stored[f"{name}.weight"], one.model.get_submodule(name).matrix.dense().half())
    assert not [name for name in stored if "_index" in name or "_blocks" in name]


def test_out_is_protected(written: Any, tmp_path: Path, tiny_folder: Path) -> None:
    one = written()
    before = sorted(path.name for path in tiny_folder.iterdir())
    with pytest.raises(HalfplateError, match="holds files that Halfplate did not write"):
        export(one.folder, tiny_folder, overwrite=True)
    assert sorted(path.name for path in tiny_folder.iterdir()) == before
    export(one.folder, tmp_path / "dense")
    with pytest.raises(HalfplateError, match="--overwrite"):
        export(one.folder, tmp_path / "dense")
    export(one.folder, tmp_path / "dense", overwrite=True)


def test_a_dense_model_is_copied_and_an_unknown_format_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match="format='ggfu' is unknown; did you mean 'gguf'"):
        export(tiny_folder, tmp_path / "dense", "ggfu")
    assert not (tmp_path / "dense").exists()
    from transformers import AutoModelForCausalLM

    assert export(tiny_folder, tmp_path / "dense").startswith(str(tmp_path / "dense"))
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_folder, tmp_path / "dense"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
