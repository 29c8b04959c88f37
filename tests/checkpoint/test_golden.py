"""Checkpoints that earlier versions wrote: read as they were, written again byte for byte (golden/make.py made them)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfplate.checkpoint.config import read_record, read_specs
from halfplate.checkpoint.read import inspect_checkpoint, load
from halfplate.checkpoint.write import write_checkpoint
from halfplate.formats.sharing import check_shared

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("version*/*/config.json"))


def test_there_are_some():
    assert {folder.name for folder in FOLDERS} == {"other", "shared", "wrapped"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_logits_are_those_of_the_day_it_was_written(folder, logits_of):
    expected = load_file(folder.parent / f"{folder.name}.logits.safetensors")["logits"]
    # Processors sum in orders of their own.
    torch.testing.assert_close(logits_of(load(folder, kernels=False)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(load(folder)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_whole_and_written_again_byte_for_byte(folder, tmp_path):
    assert inspect_checkpoint(folder, verify=True)["verified"]
    specs, record = read_specs(folder), read_record(folder)
    check_shared(specs)
    model = load(folder, kernels=False)
    write_checkpoint(model, None, tmp_path / "again", specs, record, torch.bfloat16)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
