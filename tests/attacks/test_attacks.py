"""Hostile files, each built here and refused in one line of at most a few hundred bytes, before anything is allocated by it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfplate.calibration.documents import MAX_FILE_BYTES, read_text
from halfplate.checkpoint.read import inspect_checkpoint, load
from halfplate.cli import main
from halfplate.cli.console import print_table
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.models.sources import load_dense, open_source
from halfplate.planning import make_plan
from halfplate.recipe import Recipe


def refused(action, *parts):
    with pytest.raises(HalfplateError) as caught:
        action()
    said = str(caught.value)
    assert "\n" not in said.strip()
    for part in parts:
        assert part in said


# Recipes


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("!!python/object/apply:os.system [touch hacked]", "not valid YAML"),
        ("method: !!python/name:os.system", "not valid YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
        ("method: &m armor\nexclude: [*m]\n", "aliases"),
        ("exclude: " + "[" * 5000 + "]" * 5000, "nested"),
        ("x: " + "9" * 10_000, "not valid YAML"),
        ("seed: 2001-99-99", "not valid YAML"),
        ("#" * 2**20 + "\nmethod: armor", "more than"),
        ("method: wanda\nmethod: armor", "twice"),
        ("method_options: {power: 1, power: 2}", "twice"),
        ("method: \ud800".encode("utf-8", "surrogatepass"), "not valid YAML"),
    ],
)
def test_recipes(tmp_path, monkeypatch, content, part):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: Recipe.from_yaml(path), "recipe", part)
    assert not (tmp_path / "hacked").exists()


# GGUF


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors: int = 0, entries: bytes = b"", count: int | None = None, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries.count(b"key") if count is None else count) + entries


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(kind: int, length: int, content: bytes = b"") -> bytes:
    return text(b"key") + struct.pack("<IIQ", 9, kind, length) + content


GGUF = {
    "tensors beyond the file": header(2**60),
    "entries beyond the file": header(count=2**60),
    "entries of four billion": header(count=2**32),
    "key of all memory": header(count=1) + struct.pack("<Q", 2**62),
    "array that never ends": header(entries=array(0, 2**60)),
    "array of texts that never ends": header(entries=array(8, 2**60)),
    "array of arrays": header(entries=array(9, 1, struct.pack("<IQ", 9, 1) * 5000)),
    "array of nothing known": header(entries=array(77, 2**40)),
    "text beyond the file": header(entries=text(b"key") + struct.pack("<IQ", 8, 2**63)),
    "value of no known type": header(entries=text(b"key") + struct.pack("<I", 99)),
    "one key twice": header(entries=(text(b"key") + struct.pack("<IB", 0, 1)) * 2),
    "alignment of zero": header(entries=text(b"general.alignment") + struct.pack("<II", 4, 0), count=1),
    "tensor beyond the file": header(1) + tensor(b"a", (2**20, 2**20), 0, 0) + bytes(64),
    "tensor whose size overflows": header(1) + tensor(b"a", (2**32, 2**32, 2**32), 0, 0) + bytes(64),
    "tensor behind the end": header(1) + tensor(b"a", (1,), 0, 2**62) + bytes(64),
    "tensor of many dimensions": header(1) + text(b"a") + struct.pack("<I", 2**31) + bytes(64),
    "tensor of no known type": header(1) + tensor(b"a", (1,), 4242, 0) + bytes(64),
    "tensor between blocks": header(1) + tensor(b"a", (33,), 2, 0) + bytes(64),
    "version of tomorrow": header(version=9) + bytes(64),
    "nothing": b"",
    "magic alone": b"GGUF",
    "no model": header() + bytes(64),
}


@pytest.mark.parametrize("attack", GGUF)
def test_gguf(tmp_path, attack):
    path = tmp_path / "evil.gguf"
    path.write_bytes(GGUF[attack])
    refused(lambda: open_source(str(path)), "evil.gguf")


# Dense models and checkpoints


@pytest.fixture
def checkpoint(compressed_once, tmp_path: Path) -> Path:
    return shutil.copytree(compressed_once(Recipe(method="magnitude")), tmp_path / "out")


@pytest.fixture(params=["dense", "checkpoint"])
def folder(request, tiny_folder):
    """A model folder of either kind."""
    return tiny_folder if request.param == "dense" else request.getfixturevalue("checkpoint")


def reads(folder):
    return load(folder) if (folder / "halfplate.json").exists() else load_dense(str(folder))


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pickled_weights(tiny_folder):
    tensors = load_file(tiny_folder / "model.safetensors")
    (tiny_folder / "model.safetensors").unlink()
    torch.save(tensors, tiny_folder / "pytorch_model.bin")
    refused(lambda: load_dense(str(tiny_folder)), "pickle")


def test_code_beside_the_model(folder):
    (folder / "evil.py").write_text("raise SystemExit('run')")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    refused(lambda: reads(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**9),
        ("hidden_size", 10**9),
        ("intermediate_size", 10**12),
        ("num_attention_heads", 10**15),
        ("head_dim", 10**12),
        ("num_key_value_heads", -5),
    ],
)
def test_configurations_larger_than_their_files(folder, key, value):
    edit(folder / "config.json", **{key: value})
    refused(lambda: reads(folder))


@pytest.mark.parametrize("content", ["[" * 200_000, "{" * 10, "null", '{"a": ' + "9" * 10_000 + "}", "\x00", ""])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_files(folder, file, content):
    (folder / file).write_text(content)
    if file != "config.json":
        (folder / "model.safetensors").unlink()
    refused(lambda: reads(folder))


def test_json_of_all_memory(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**40)  # a hole: no byte of it lies on the disk
    refused(lambda: reads(folder))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/passwd",
        "a/../b.safetensors",
        "..\\x.safetensors",
        "\0",
        7,
        {},
        "a" * 300 + ".safetensors",
    ],
)
def test_shards_elsewhere(folder, name):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(lambda: reads(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_links_that_lead_out(folder, tmp_path, file):
    """A link to a secret would have it copied into a result that is then published."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(secret)
    refused(lambda: reads(folder), file, "leads out")


def test_links_of_the_hub_cache_are_followed(tiny_folder, tmp_path):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny_folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert len(make_plan(str(snapshot), Recipe(method="magnitude")).specs) == 14


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "halfplate.json"])
def test_pipes(folder, file):
    """Opening one waits for ever for somebody who writes to it."""
    if not (folder / file).exists():
        pytest.skip("a dense model has no such file")
    (folder / file).unlink()
    os.mkfifo(folder / file)
    if file == "halfplate.json":
        refused(lambda: inspect_checkpoint(folder, verify=True), "regular file")
    else:
        refused(lambda: reads(folder))


@pytest.mark.parametrize("card", ["pipe", "hole", "nested", "aliases"])
def test_model_cards(tiny_folder, tmp_path, card):
    """The licence is read from it when all work is done: a bad one must not cost the result."""
    path = tiny_folder / "README.md"
    if card == "pipe":
        os.mkfifo(path)
    else:
        bombs = {"hole": "x: y\n", "nested": f"x: {'[' * 5000}\n", "aliases": "a: &a [x]\nb: [*a, *a]\n"}
        path.write_text(f"---\nlicense: mit\n{bombs[card]}---\n")
        if card == "hole":
            os.truncate(path, 2**40)
    compress(str(tiny_folder), tmp_path / "out", Recipe(method="magnitude"))
    licence = json.loads((tmp_path / "out" / "halfplate.json").read_text())["license"]
    assert licence == ("mit" if card == "hole" else None)


def test_links_that_lead_to_themselves(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refused(lambda: reads(folder), "leads out")


def test_an_adapter_whose_base_is_elsewhere(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model", "peft_type": "LORA"}')
    refused(lambda: reads(folder), "adapter")


def safetensors(**entries) -> bytes:
    content = json.dumps(entries).encode()
    return struct.pack("<Q", len(content)) + content


HEADERS = {
    "length of all memory": struct.pack("<Q", 2**63) + b"{}",
    "length of a gigabyte": struct.pack("<Q", 2**30) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "offsets behind the end": safetensors(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
    "offsets that turn round": safetensors(a={"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}) + bytes(8),
    "offsets before the start": safetensors(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}) + bytes(8),
    "offset of infinity": struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}',
    "shape that overflows": safetensors(a={"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}),
    "shape below zero": safetensors(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + bytes(4),
    "shape of another size": safetensors(a={"dtype": "F32", "shape": [100], "data_offsets": [0, 4]}) + bytes(4),
    "no entry": safetensors(a=None),
    "tensors that overlap": safetensors(
        **{name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
    )
    + bytes(8),
    "a gap between tensors": safetensors(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + bytes(8),
    "bytes of no tensor": safetensors(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(8),
    "one name twice": struct.pack("<Q", 112)
    + (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        + b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ).ljust(112)
    + bytes(4),
    "empty": b"",
}


@pytest.mark.parametrize("attack", HEADERS)
def test_safetensors_headers(folder, attack):
    (folder / "model.safetensors").write_bytes(HEADERS[attack])
    refused(lambda: reads(folder))


def test_positions_that_would_lead_a_kernel_astray(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_index"))
    tensors[name].fill_(255)
    save_file(tensors, path, metadata={"format": "pt"})
    refused(lambda: load(checkpoint), name)


@pytest.mark.parametrize("shape", [[2**62, 2**62], [-4, 4], [0, 4], ["a", 4], [10**30, 4], []])
def test_shapes_of_modules(checkpoint, shape):
    config = json.loads((checkpoint / "config.json").read_text())
    module = next(iter(config["quantization_config"]["modules"].values()))
    module["shape"] = shape
    (checkpoint / "config.json").write_text(json.dumps(config))
    refused(lambda: inspect_checkpoint(checkpoint))


def test_names_that_steer_a_terminal(checkpoint, capsys):
    """They would hide what an error or a table says, or fill the screen."""
    config = json.loads((checkpoint / "config.json").read_text())
    module = next(iter(config["quantization_config"]["modules"].values()))
    module["in_shared"] = "\x1b[2J\u202e" + "x" * 10**6
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("halfplate: error: quantization_config.modules")
    assert len(said) < 3000
    assert "\x1b" not in said
    print_table("t", ("name",), [("\x1b[2J\u202eevil",)])
    assert "\\u001b[2J\\u202eevil" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record",
    [
        {"matrices": [1]},
        {"matrices": {}},
        {"recipe": [1]},
        {"identity": 5},
        {"tuned_blocks": 5},
        {"ratios": "x"},
        {"search": {"trajectory": [{}]}},
    ],
)
def test_records_that_resume_believes(checkpoint, tiny_folder_once, record):
    edit(checkpoint / "halfplate.json", **record)
    refused(lambda: compress(str(tiny_folder_once), checkpoint, Recipe(method="magnitude"), resume=True), "exists")


# Calibration text


def test_text_that_unpacks_to_all_memory(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(MAX_FILE_BYTES // 2**24 + 1):
            file.write(b" " * 2**24)
    assert path.stat().st_size < 4 * 2**20
    refused(lambda: read_text(str(path)), "MiB")


@pytest.mark.parametrize("row", ["[" * 100_000, '{"text": 7}', "9" * 10_000, '{"text": "\\ud800"}', "\x00"])
def test_rows_of_text(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + row + "\n")
    refused(lambda: read_text(str(tmp_path / "rows.jsonl")), "line 2")
