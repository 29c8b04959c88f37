"""Steps of size: their order in the file, loading the first of them, and reading no more than that."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from halfplate.checkpoint.loading import load_any
from halfplate.checkpoint.read import load
from halfplate.checkpoint.stack import stack_order
from halfplate.cli import main
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.methods import create
from halfplate.pattern import NONE
from halfplate.recipe import Recipe
from halfplate.recovery.loss import divergence
from halfplate.storage import tensor_file

IDS = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(3))
BITSTACK = Recipe(method="bitstack", method_options={"share": 0.7}, samples=4, seq_len=32, threads=1)


@pytest.fixture
def stacked(compressed_once: Callable[[Recipe], Path]) -> Path:
    """A tiny model by BitStack."""
    return compressed_once(BITSTACK)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: part.matrix.dense() for name, part in model.named_modules() if isinstance(part, CompressedLinear)}


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def least_of(folder: Path) -> int:
    with pytest.raises(HalfplateError, match="takes at least") as refused:
        load(folder, fit=1, kernels=False)
    return int(str(refused.value).partition("takes at least ")[2].partition(" bytes")[0].replace(",", ""))


@torch.no_grad()
def kl(model: Any, original: Any) -> float:
    return float(divergence(model(IDS).logits.flatten(0, 1), original(IDS).logits.flatten(0, 1)))


def test_kl_falls_with_the_size(stacked: Path, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    least, most = least_of(stacked), size_of(stacked)
    sizes = [least + (most - least) * step // 6 for step in range(7)]
    found = [kl(load(stacked, fit=size, kernels=False), original) for size in sizes]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.3 * found[0]


def test_all_that_fits_is_the_whole(stacked: Path) -> None:
    whole, fitted = weights(load(stacked, kernels=False)), weights(load(stacked, fit="1GB", kernels=False))
    assert whole.keys() == fitted.keys()
    assert all(torch.equal(whole[name], fitted[name]) for name in whole)


def test_reads_only_the_prefix(stacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = (least_of(stacked) + size_of(stacked)) // 2
    ends = []
    pread = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        got = pread(descriptor, buffers, offset)
        ends.append((offset, offset + got))
        return got

    monkeypatch.setattr(tensor_file.os, "preadv", counted)
    load(stacked, fit=fit, kernels=False)
    assert 0.7 * fit < max(end for _, end in ends) <= fit
    assert sum(end - start for start, end in ends) <= fit


def test_a_truncated_file_is_enough(stacked: Path, tmp_path: Path) -> None:
    fit = (least_of(stacked) + size_of(stacked)) // 2
    cut = copytree(stacked, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", fit)
    expected, found = weights(load(stacked, fit=fit, kernels=False)), weights(load(cut, fit="1GB", kernels=False))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(HalfplateError, match="cut short"):
        load(cut)


def test_saved_again_it_still_fits(stacked: Path, tmp_path: Path) -> None:
    fit = (least_of(stacked) + size_of(stacked)) // 2
    load(stacked, kernels=False).save_pretrained(tmp_path / "again")
    found = weights(load(tmp_path / "again", fit=fit, kernels=False))
    assert all(tensor.abs().sum() > 0 for tensor in found.values())
    smaller = load(stacked, fit=fit, kernels=False)
    smaller.save_pretrained(tmp_path / "smaller")
    assert size_of(tmp_path / "smaller") <= fit
    expected, found = weights(smaller), weights(load(tmp_path / "smaller", kernels=False))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_fitted_model_generates(stacked: Path) -> None:
    model = load(stacked, fit=size_of(stacked) - 1)
    assert model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_the_command_line_takes_a_size(stacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(stacked), "hello", "--max-new-tokens", "2", "--fit"]
    assert main([*words, f"{size_of(stacked) - 1}B"]) == 0
    assert main([*words, "1B"]) != 0
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"takes at least {least_of(stacked):,} bytes" in message


@pytest.mark.parametrize("fit", [0, -5, "lots", 1.5, True])
def test_what_is_no_size_is_refused(stacked: Path, fit: Any) -> None:
    with pytest.raises(HalfplateError, match="fit="):
        load(stacked, fit=fit)


def test_a_checkpoint_of_one_size_is_refused(compressed_once: Callable[[Recipe], Path], tiny_folder: Path) -> None:
    with pytest.raises(HalfplateError, match=r"has one size.*--method bitstack"):
        load(compressed_once(Recipe(method="magnitude", samples=4, seq_len=32)), fit="300MB")
    with pytest.raises(HalfplateError, match="fit='300MB' is for checkpoints of method bitstack"):
        load_any(str(tiny_folder), fit="300MB")


def test_order_is_by_gain_for_each_byte() -> None:
    method = create("bitstack", rank=1, share=0.5)
    specs = {name: method.sized(WeightSpec(64, 64, NONE)) for name in ("a", "b")}
    steps = len(specs["a"].steps())
    falling = [4.0**-step for step in range(steps + 1)]
    order = stack_order(specs, {"a": falling, "b": [100 * loss for loss in falling]})
    levels = [name.replace("weight_signs_", "") for name in order if "signs" in name]
    assert levels[:5] == ["a.0", "b.0", "b.1", "b.2", "b.3"]
    assert sorted(levels) == sorted(f"{name}.{step}" for name in "ab" for step in range(steps))
    for name in "ab":
        assert [level for level in levels if level[0] == name] == [f"{name}.{step}" for step in range(steps)]
    assert [name for name in stack_order(specs) if "signs" in name][:4] == [
        f"{name}.weight_signs_{step}" for step in (0, 1) for name in "ab"
    ]
