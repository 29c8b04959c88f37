"""The self-check after a compression, on sound results and on faults that are put in on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from halfplate.compression import compress as local
from halfplate.compression import self_check
from halfplate.compression.compress import assemble_weights, compress
from halfplate.errors import RuinedResult
from halfplate.evaluation.perplexity import evaluate
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe

RECIPES: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "rtn": {"method": "rtn", "core_dtype": "int8"},
    "shared wrappers": {"block_size": 4, "share_wrappers": True, "method_options": {"iterations": 1}},
    "tuned": {"block_size": 4, "tune_block": 4, "method_options": {"iterations": 1}},
    "int3": {"pattern": "dense", "core_dtype": "int3", "block_size": 4, "method_options": {"iterations": 1}},
}


def recipe(name: str) -> Recipe:
    return Recipe(**RECIPES[name], samples=4, seq_len=32, threads=1)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("whole", [True, False], ids=["loaded whole", "by layer"])
def test_a_sound_result_passes(
    name: str, whole: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "check_loads_whole", lambda *_: whole)
    summary = compress(str(tiny_folder), tmp_path / "out", recipe(name))
    check = summary["check"]
    assert check["loaded"] == ("whole" if whole else "by layer")
    assert check["logit_error"] < 1e-3
    assert check["kl"] >= 0
    assert json.loads((tmp_path / "out" / "halfplate.json").read_text())["check"] == check


def test_the_kl_is_that_of_evaluate(tiny_folder: Path, tmp_path: Path) -> None:
    summary = compress(str(tiny_folder), tmp_path / "out", recipe("magnitude"))
    dense = load_dense(str(tiny_folder))
    ids = self_check.check_tokens(dense.tokenizer, dense.model)
    expected = evaluate(local.load(tmp_path / "out", kernels=False), ids, dense.model)
    assert summary["check"]["tokens"] == expected["tokens"]
    assert summary["check"]["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert summary["check"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
    assert summary["check"]["dense_perplexity"] == pytest.approx(expected["dense_perplexity"], rel=1e-3)
    assert summary["check"]["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=0.02)


@pytest.mark.parametrize("whole", [True, False], ids=["loaded whole", "by layer"])
def test_a_file_that_is_not_what_was_solved_is_refused(
    whole: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "check_loads_whole", lambda *_: whole)
    assemble = local.assemble_weights

    def damaged(streamed: Any, plan: Any, work: Any, folder: Path, *rest: Any) -> dict[str, str]:
        checksums = assemble(streamed, plan, work, folder, *rest)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.mlp.down_proj.weight"
        save_file(tensors | {name: tensors[name] * 2}, file)
        return checksums

    monkeypatch.setattr(local, "assemble_weights", damaged)
    with pytest.raises(RuinedResult, match="self-check: the logits of the written checkpoint differ"):
        compress(str(tiny_folder), tmp_path / "out", recipe("magnitude"))
    assert not (tmp_path / "out").exists()
    assert compress(str(tiny_folder), tmp_path / "out", recipe("magnitude"), resume=True, check=False)["check"] is None


def change(name: str, factor: float) -> Any:
    """`assemble_weights`, and one tensor of the file multiplied afterwards."""

    def changed(streamed: Any, plan: Any, work: Any, folder: Path, *rest: Any) -> dict[str, str]:
        checksums = assemble_weights(streamed, plan, work, folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: tensors[name] * factor}, folder / "model.safetensors")
        return checksums

    return changed


@pytest.mark.parametrize("whole", [True, False], ids=["loaded whole", "by layer"])
@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("model.layers.1.self_attn.q_proj.weight_scales", 1.03),
        ("model.layers.0.input_layernorm.weight", 1.05),
        ("model.norm.weight", 1.05),
        ("model.embed_tokens.weight", 1.05),
        ("lm_head.weight", 1.05),
    ],
)
def test_small_faults_anywhere_are_found(
    whole: bool, name: str, factor: float, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "check_loads_whole", lambda *_: whole)
    monkeypatch.setattr(local, "assemble_weights", change(name, factor))
    with pytest.raises(RuinedResult, match=r"self-check: .*the written checkpoint"):
        compress(str(tiny_folder), tmp_path / "out", recipe("rtn"))
    assert not (tmp_path / "out").exists()


def test_by_layer_reads_no_more_than_a_layer(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[set[str]] = []
    read_tensors = self_check.read_tensors

    def watched(found: Any) -> Any:
        read.append(set())
        for name, tensor in read_tensors(found):
            read[-1].add(name)
            yield name, tensor

    monkeypatch.setattr(self_check, "read_tensors", watched)
    monkeypatch.setattr(self_check, "check_loads_whole", lambda *_: False)
    compress(str(tiny_folder), tmp_path / "out", recipe("rtn"))
    places = ({name.partition(".layers.")[2][:2] or name for name in names} for names in read)
    assert sorted(map(sorted, places)) == [
        ["0."],
        ["1."],
        ["lm_head.weight"],
        ["model.embed_tokens.weight"],
        ["model.norm.weight"],
    ]


@pytest.mark.slow
def test_a_run_broken_off_in_the_check_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(str(tiny_folder), tmp_path / "whole", recipe("rtn"))

    def breaking(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(self_check, "check_tokens", breaking)
        with pytest.raises(KeyboardInterrupt):
            compress(str(tiny_folder), tmp_path / "out", recipe("rtn"))
    assert not (tmp_path / "out").exists()
    assert compress(str(tiny_folder), tmp_path / "out", recipe("rtn"), resume=True)["check"] == whole["check"]
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "out"))
    assert one == two


def test_single_tokens_may_differ_more_than_most() -> None:
    """As where the near-tie of a router falls otherwise; not where a GPU multiplies in halves."""
    solved, stored = torch.ones(1, 100, 8), torch.ones(1, 100, 8)
    stored[0, 7] += 0.1
    assert self_check._checked_error(stored, solved, exact=True) == pytest.approx(0.01)
    even = solved * 1.005
    with pytest.raises(RuinedResult, match=r"by 0\.005 of their norm at half of the tokens, expected at most 0\.001"):
        self_check._checked_error(even, solved, exact=True)
    assert self_check._checked_error(even, solved, exact=False) == pytest.approx(0.005)


def test_a_result_that_loads_as_another_model_is_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = self_check.load

    def wrong(*args: Any, **options: Any) -> Any:
        model: Any = load(*args, **options)
        with torch.no_grad():
            model.model.norm.weight.mul_(-1)
        return model

    monkeypatch.setattr(self_check, "load", wrong)
    with pytest.raises(RuinedResult, match="self-check"):
        compress(str(tiny_folder), tmp_path / "out", recipe("magnitude"))


def test_numbers_that_are_not_finite_are_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "_loaded_logits", lambda folder, *_: torch.tensor(torch.nan))
    with pytest.raises(RuinedResult, match="differ from those of the solved weights by nan"):
        compress(str(tiny_folder), tmp_path / "out", recipe("magnitude"))


def test_nonsense_is_said_so() -> None:
    assert self_check.SelfCheck(2.0, 0.1, 9.0, 5.0, 0.0, 127, "whole").nonsense
    assert self_check.SelfCheck(float("nan"), 0.1, 9.0, 5.0, 0.0, 127, "whole").to_json()["nonsense"]
    assert not self_check.SelfCheck(0.5, 0.8, 9.0, 5.0, 0.0, 127, "whole").nonsense


class Tokenizer:
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.ids}


@pytest.mark.parametrize("ids", [[], [5] * 8, [10**6] * 300, [3, 10**6] * 300], ids=["none", "few", "beyond", "mixed"])
def test_tokens_lie_in_the_vocabulary(ids: list[int], tiny_model: Any) -> None:
    model = tiny_model()
    found = self_check.check_tokens(Tokenizer(ids), model)
    assert found.shape == (1, 128)
    assert int(found.min()) >= 0
    assert int(found.max()) < model.config.vocab_size


def test_layers_that_are_not_a_chain_are_checked_as_the_model_runs_them(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_models.build_model("dory")  # runs its middle layers twice
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    recipe = Recipe(method="rtn", pattern="dense", core_dtype="int8", threads=1)
    summary = compress(str(tmp_path / "dense"), tmp_path / "out", recipe, benchmark=False)
    assert summary["check"]["logit_error"] < 1e-4
    assert summary["check"]["kl"] < 0.1
