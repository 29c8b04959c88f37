"""Every damaged, hostile or too new checkpoint is refused by name, in one line, before anything is computed."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfplate.checkpoint.read import inspect_checkpoint, load, load_tokenizer
from halfplate.errors import HalfplateError
from halfplate.exports import export

NAME = "model.layers.0.self_attn.q_proj"  # 2:4, tails on both sides


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, complaint: str, doors: tuple[Callable[[Path], Any], ...] = (load,)) -> None:
    for door in doors:
        with pytest.raises(HalfplateError, match=complaint) as raised:
            door(folder)
        assert "\n" not in str(raised.value)


both = (load, inspect_checkpoint)
every = (load, AutoModelForCausalLM.from_pretrained)


def test_what_is_no_checkpoint(tmp_path: Path, tiny_folder: Path) -> None:
    refused(tmp_path / "absent", "absent' is not a folder", both)
    refused(tmp_path, "config.json' does not exist", both)
    refused(tiny_folder, "is not a Halfplate checkpoint", both)
    refused(tiny_folder / "config.json", "is not a folder", both)
    with pytest.raises(HalfplateError, match="is not a folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(HalfplateError, match="has no tokenizer that can be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "\udc80", "[" * 100_000, '{"quantization_config": ' + "9" * 5000 + "}"]
)
def test_config_that_is_no_json_object(written: Any, text: str) -> None:
    one = written()
    (one.folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(one.folder, r"config\.json' (cannot be read as JSON|holds a JSON)", both)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda q: q.update(version=2), r"version=2 is newer than halfplate .* supports \(1\); upgrade halfplate"),
        (lambda q: q.update(version=0), "version=0 must be a positive integer"),
        (lambda q: q.update(version=True), "version=True must be a positive integer"),
        (lambda q: q.pop("version"), "version=None must be a positive integer"),
        (lambda q: q.pop("modules"), "modules is of type NoneType"),
        (lambda q: q.update(modules=[]), "modules is of type list"),
        (lambda q: q["modules"].update({NAME: 7}), rf"modules\['{NAME}'\]=7 cannot be read"),
        (lambda q: q["modules"][NAME].update(pattern="4:2"), "pattern=4:2 must be N:M"),
        (lambda q: q["modules"][NAME].update(core_dtype="int7"), "core_dtype='int7' is not one of"),
        (lambda q: q["modules"][NAME].update(core_dtype="int4"), rf"{NAME}\.weight in .* expected uint8 \(32, 8\)"),
        (lambda q: q["modules"][NAME].update(wrapper_dtype="int4"), "wrapper_dtype='int4' is not one of"),
        (lambda q: q["modules"][NAME].update(wrapper_dtype="int8"), "weight_out_blocks .* expected int8"),
        (
            lambda q: q["modules"][NAME].update(pattern="dense"),
            rf"{NAME}\.weight in .* expected bfloat16 \(1, 32, 32\)",
        ),
        (lambda q: q["modules"][NAME].update(pattern="1:1"), "pattern='1:1' keeps every value"),
        (lambda q: q["modules"][NAME].update(in_block=10**12), "weight_in_tail .*expected bfloat16"),
        (lambda q: q["modules"][NAME].update(shape=[10**12, 32]), rf"{NAME}\.weight in model.safetensors is"),
        (lambda q: q["modules"][NAME].update(core_dtype="fp16"), rf"{NAME}\.weight in model.safetensors is bfloat16"),
        (lambda q: q["modules"][NAME].update(pattern="1:4"), rf"{NAME}\.weight in model.safetensors is bfloat16"),
        (lambda q: q["modules"][NAME].update(out_block=0), "does not belong to a chain matrix"),
    ],
)
def test_quantization_config(written: Any, change: Callable[[dict[str, Any]], Any], complaint: str) -> None:
    one = written()
    edit_config(one.folder, lambda config: change(config["quantization_config"]))
    refused(one.folder, complaint, (*every, inspect_checkpoint))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("model.layers.9.self_attn.q_proj", r"weight is missing"),
        ("model.layers.0.self_attn", r"weight is missing"),
        ("../../etc", "weight is missing"),
    ],
)
def test_modules_that_the_files_do_not_have(written: Any, name: str, complaint: str) -> None:
    one = written()
    edit_config(
        one.folder, lambda config: config["quantization_config"]["modules"].update({name: one.specs[NAME].to_json()})
    )
    refused(one.folder, complaint, every)


def test_a_module_that_the_model_does_not_have(written: Any) -> None:
    one = written()
    other = "model.layers.9.self_attn.q_proj"
    edit_config(
        one.folder, lambda config: config["quantization_config"]["modules"].update({other: one.specs[NAME].to_json()})
    )
    edit_tensors(
        one.folder,
        lambda tensors: tensors.update(
            {f"{other}.{part}": tensors[f"{NAME}.{part}"].clone() for part in one.specs[NAME].layout()}
        ),
    )
    refused(one.folder, rf"names '{other}', which LlamaForCausalLM does not have", every)


def test_a_module_that_is_no_linear_or_of_another_size(written: Any) -> None:
    one = written()
    other = "model.layers.0.mlp.down_proj"
    for target, complaint in (
        (other, r"shape=\[32, 32\] does not fit the model, expected \[32, 48\]"),
        ("model.embed_tokens", r"shape=\[32, 32\] does not fit the model, expected \[\d+, 32\]"),
        ("model.norm", "is a LlamaRMSNorm, expected a plain Linear or Embedding"),
    ):

        def move(tensors: dict[str, torch.Tensor], target: str = target) -> None:
            for name in [name for name in tensors if name.startswith(f"{target}.")]:
                del tensors[name]
            tensors.update({f"{target}.{part}": tensors[f"{NAME}.{part}"].clone() for part in one.specs[NAME].layout()})

        folder = shutil.copytree(one.folder, one.folder.with_name(target))
        edit_config(
            folder,
            lambda config, target=target: config["quantization_config"]["modules"].update(
                {target: one.specs[NAME].to_json()}
            ),
        )
        edit_tensors(folder, move)
        refused(folder, complaint, every)


@pytest.mark.parametrize(
    "part", ["weight", "weight_index", "weight_out_blocks", "weight_out_tail", "weight_in_blocks", "weight_in_tail"]
)
def test_a_missing_or_misshapen_tensor_is_named(written: Any, part: str) -> None:
    one = written()
    good = load_file(one.folder / "model.safetensors")[f"{NAME}.{part}"]
    for bad in (None, good[..., :-1], good.to(torch.float64), good.unsqueeze(0)):

        def damage(tensors: dict[str, torch.Tensor], bad: torch.Tensor | None = bad) -> None:
            tensors.pop(f"{NAME}.{part}", None)
            if bad is not None:
                tensors[f"{NAME}.{part}"] = bad.contiguous()

        edit_tensors(one.folder, damage)
        refused(one.folder, rf"{NAME}\.{part} ", (*every, inspect_checkpoint))


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"],
)
def test_a_missing_tensor_outside_the_matrices_is_named(written: Any, name: str) -> None:
    one = written(tie_word_embeddings=False)
    edit_tensors(one.folder, lambda tensors: tensors.pop(name))
    refused(one.folder, name.replace(".", r"\."), every)


def test_biases_have_to_be_those_of_the_model(written: Any) -> None:
    one = written("qwen2")
    edit_tensors(one.folder, lambda tensors: tensors.pop(f"{NAME}.bias"))
    refused(one.folder, rf"{NAME}\.bias is missing", every)
    edit_tensors(one.folder, lambda tensors: tensors.update({f"{NAME}.bias": torch.zeros(31, dtype=torch.bfloat16)}))
    refused(one.folder, rf"{NAME}\.bias has the shape \(31,\)", every)
    other = "model.layers.0.mlp.up_proj"
    edit_tensors(
        one.folder, lambda tensors: tensors.update({f"{NAME}.bias": torch.zeros(32), f"{other}.bias": torch.zeros(48)})
    )
    refused(one.folder, rf"{other}\.bias is stored, but the model does not have it", every)


def test_a_stray_tensor_is_named(written: Any) -> None:
    one = written()
    edit_tensors(one.folder, lambda tensors: tensors.update({f"{NAME}.weight_scales": torch.zeros(3)}))
    refused(one.folder, rf"{NAME}\.weight_scales in model\.safetensors does not belong", (*every, inspect_checkpoint))
    edit_tensors(
        one.folder,
        lambda tensors: (tensors.pop(f"{NAME}.weight_scales"), tensors.update({"model.more": torch.zeros(3)})),
    )
    refused(one.folder, r"unexpected_keys model\.more")


def test_an_invalid_index_is_refused(written: Any) -> None:
    one = written()
    edit_tensors(one.folder, lambda tensors: tensors[f"{NAME}.weight_index"].__setitem__((3, 1), 0))
    refused(one.folder, rf"{NAME}\.weight_index holds positions that do not increase", every)


GRID = [{"core_dtype": "int8", "out_block": 10, "in_block": 24, "wrapper_dtype": "int8"}]


@pytest.mark.parametrize(
    ("part", "value", "complaint"),
    [
        ("weight", 0, "holds the code 0"),
        ("weight_scales", -1.0, "holds -1, expected scales of 0 or more"),
        ("weight_scales", float("nan"), "holds NaN or inf"),
        ("weight_out_scales", float("inf"), "holds NaN or inf"),
        ("weight_in_blocks", -128, "holds -128"),
        ("weight_out_tail", -128, "holds -128"),
    ],
)
def test_invalid_codes_and_scales_are_refused(written: Any, part: str, value: float, complaint: str) -> None:
    one = written(variety=GRID)
    edit_tensors(one.folder, lambda tensors: tensors[f"{NAME}.{part}"].view(-1)[:1].fill_(value))
    refused(one.folder, rf"{NAME}\.{part} {complaint}", every)


def test_an_order_of_inputs_that_is_none_is_refused(written: Any) -> None:
    one = written(variety=[{"core_dtype": "int8", "permuted": True}])
    part, complaint = f"{NAME}.weight_permutation", rf"{NAME}\.weight_permutation"
    good = load_file(one.folder / "model.safetensors")[part]
    for value in (-1, 32, int(good[1])):
        edit_tensors(one.folder, lambda tensors, value=value: tensors[part].view(-1)[:1].fill_(value))
        refused(one.folder, rf"{complaint} is not a permutation of 0 to 31", every)
    for bad, words in (
        (good.int(), r" in .*int32 .* expected int16"),
        (good[:-1], r" in .*\(31,\)"),
        (None, " is missing"),
    ):
        edit_tensors(one.folder, lambda tensors: tensors.pop(part, None))
        if bad is not None:
            edit_tensors(one.folder, lambda tensors, bad=bad: tensors.update({part: bad}))
        refused(one.folder, complaint + words, (*every, inspect_checkpoint))


@pytest.mark.parametrize("part", ["weight_scales", "weight_out_scales", "weight_in_scales"])
def test_missing_scales_are_named(written: Any, part: str) -> None:
    one = written(variety=GRID)
    edit_tensors(one.folder, lambda tensors: tensors.pop(f"{NAME}.{part}"))
    refused(one.folder, rf"{NAME}\.{part} is missing", (*every, inspect_checkpoint))


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_a_file_cut_short_is_named(written: Any, cut: int) -> None:
    one = written(max_shard_nbytes=20_000)
    file = one.folder / "model-00002-of-00004.safetensors"
    assert file.is_file()
    file.write_bytes(file.read_bytes()[:-cut])
    refused(one.folder, r"model-00002-of-00004\.safetensors' is damaged or cut short", both)
    file.write_bytes(b"")
    refused(one.folder, r"model-00002-of-00004\.safetensors' is damaged or cut short", both)
    file.unlink()
    refused(one.folder, r"model-00002-of-00004\.safetensors' does not exist", both)


def test_headers_that_lie(written: Any) -> None:
    one = written()
    file = one.folder / "model.safetensors"
    data = file.read_bytes()
    for bad in (
        struct.pack("<Q", 2**63) + data[8:],
        struct.pack("<Q", len(data)) + data[8:],
        data + b"\0",
        struct.pack("<Q", 2) + b"{}" + data,
        struct.pack("<Q", 4) + b"null",
    ):
        file.write_bytes(bad)
        refused(one.folder, "damaged or cut short", both)
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    refused(one.folder, "a in .* has the element type F8_E4M3", both)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/tmp/evil.safetensors",
        "a/b.safetensors",
        "..\\b.safetensors",
        "evil.bin",
        "c:x.safetensors",
        7,
        None,
    ],
)
def test_shard_names_that_leave_the_folder(written: Any, name: Any) -> None:
    one = written(max_shard_nbytes=20_000)
    path = one.folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    refused(one.folder, "expected a .safetensors file of the same folder", both)


def test_an_index_that_does_not_agree_with_its_files(written: Any) -> None:
    one = written(max_shard_nbytes=20_000)
    path = one.folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())["weight_map"]
    files = sorted(set(good.values()))
    norm = "model.norm.weight"
    wrong = next(file for file in files if file != good[norm])
    for weight_map, complaint in (
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        ([norm], "has no weight_map"),
        (good | {norm: wrong}, rf"{norm} is in {good[norm]}, but"),
        (good | {"model.more": wrong}, f"model.more is not in {wrong}"),
        ({name: file for name, file in good.items() if name != norm}, f"{norm} is in {good[norm]}, but"),
    ):
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        refused(one.folder, complaint, both)
    path.unlink()
    refused(one.folder, r"model\.safetensors' does not exist", both)


def test_pickled_weights_are_never_read(written: Any) -> None:
    one = written()
    torch.save(load_file(one.folder / "model.safetensors"), one.folder / "pytorch_model.bin")
    (one.folder / "model.safetensors").unlink()
    refused(one.folder, r"model\.safetensors' does not exist", both)


def test_code_in_the_folder_is_never_run(written: Any) -> None:
    one = written()
    (one.folder / "evil.py").write_text("raise SystemExit('run')")
    edit_config(
        one.folder,
        lambda config: config.update(
            model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        ),
    )
    refused(one.folder, "cannot be loaded by transformers .*trust_remote_code")


def test_a_model_type_that_transformers_does_not_know(written: Any) -> None:
    one = written()
    edit_config(one.folder, lambda config: config.update(model_type="llama9"))
    refused(one.folder, "cannot be loaded by transformers .*llama9")


@pytest.mark.parametrize("name", [f"{NAME}.weight", f"{NAME}.weight_out_blocks", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(written: Any, name: str, value: float) -> None:
    checkpoint = written().folder
    edit_tensors(checkpoint, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    refused(checkpoint, f"{name} holds NaN or inf")


def test_export_compares_checksums(written: Any, tmp_path: Path) -> None:
    checkpoint = written().folder
    edit_tensors(checkpoint, lambda tensors: tensors[f"{NAME}.weight"].view(-1)[:1].add_(1))
    load(checkpoint)  # a value is as good as another to a reader without checksums
    refused(checkpoint, "does not have the checksum", (lambda folder: export(folder, tmp_path / "dense"),))
    assert not (tmp_path / "dense").exists()


def test_compressed_tensors_that_no_module_names(written: Any) -> None:
    checkpoint = written().folder
    edit_config(checkpoint, lambda config: config["quantization_config"]["modules"].pop(NAME))
    refused(checkpoint, "does not name", (load, inspect_checkpoint))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", -1),
        ("hidden_size", "x"),
        ("rope_parameters", "x"),
        ("num_attention_heads", 0),
        ("vocab_size", 10),
    ],
)
def test_configurations_that_fit_no_model(written: Any, key: str, value: Any) -> None:
    checkpoint = written().folder
    edit_config(checkpoint, lambda config: config.__setitem__(key, value))
    refused(checkpoint, "path=|embed_tokens")
