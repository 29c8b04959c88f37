"""Writes golden checkpoints, files of one format version that later code has to read.

Run it for a new format version only, into a folder of its own: PYTHONPATH=src:tests:tests/checkpoint python tests/checkpoint/golden/make.py OUT
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from halfplate.checkpoint.read import load
from halfplate.checkpoint.write import write_checkpoint
from halfplate.formats import CompressedLinear, connect
from halfplate.pattern import DENSE, Pattern

TESTS = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 112, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
KINDS: dict[str, list[dict[str, Any]]] = {
    "wrapped": [
        {"pattern": Pattern(2, 4), "out_block": 10, "in_block": 8},
        {"pattern": Pattern(4, 8), "out_block": 64, "in_block": 64, "core_dtype": "int8", "wrapper_dtype": "int8"},
        {"pattern": Pattern(1, 4), "out_block": 1, "in_block": 1, "core_dtype": "fp16", "wrapper_dtype": "fp16"},
        {"pattern": DENSE, "core_dtype": "int2", "in_block": 8, "wrapper_dtype": "fp32"},
        {"pattern": Pattern(2, 4), "core_dtype": "int4", "out_block": 8, "wrapper_dtype": "int8"},
    ],
    "other": [
        {"pattern": Pattern(2, 4), "core_dtype": "fp32", "rank": 3, "permuted": True},
        {"pattern": DENSE, "core_dtype": "int4", "group": 32},
        {"pattern": DENSE, "core_dtype": "int3"},
        {"pattern": Pattern(1, 2), "core_dtype": "int8", "permuted": True, "group": 64},
        {"pattern": Pattern(3, 8)},
        {"pattern": DENSE},
        {"pattern": DENSE, "core_dtype": "int8", "rank": 2, "wrapper_dtype": "fp16"},
    ],
    "shared": [{"pattern": Pattern(2, 4), "out_block": 8, "in_block": 8}],
}


def module_of(path: Path) -> ModuleType:
    """A file of the tests, which is part of no package."""
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.parent.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_inputs(model: Any, specs: dict[str, Any]) -> None:
    """Let k_proj and v_proj of each layer take the input wrapper of q_proj."""
    for name in [name for name in specs if name.endswith(("k_proj", "v_proj"))]:
        linear = model.get_submodule(name)
        specs[name] = replace(specs[name], in_shared=name[: -len("k_proj")] + "q_proj")
        stored = {key: tensor for key, tensor in linear.stored().items() if not key.startswith("weight_in_")}
        model.set_submodule(name, CompressedLinear.from_stored(stored, specs[name], linear.bias))
    connect(model)


def make(out: Path) -> None:
    """Write one checkpoint of each kind, with its logits on the torch path beside it."""
    shapes, by_hand = module_of(TESTS / "conftest.py"), module_of(TESTS / "checkpoint" / "conftest.py")
    for kind, variety in KINDS.items():
        model = shapes.build_model("llama", **SIZES)
        specs = by_hand.compress_by_hand(model, variety)
        if kind == "shared":
            share_inputs(model, specs)
        record = {"matrices": {name: {"relative_error": 0.25} for name in specs}, "recipe": {"method": "magnitude"}}
        write_checkpoint(model, None, out / kind, specs, record, torch.bfloat16)
        save_file({"logits": by_hand.logits(load(out / kind, kernels=False))}, out / f"{kind}.logits.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
