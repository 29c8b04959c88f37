"""A size of the whole result, and targets: kept in the file that is written, planned in words, refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfplate.allocation import TARGETS, candidates, table_candidates
from halfplate.arguments import size_in_bytes
from halfplate.cli import main
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.exports import export
from halfplate.formats import NMSparse, WeightSpec
from halfplate.methods import create
from halfplate.models.gguf_blocks import block_type
from halfplate.pattern import DENSE
from halfplate.planning import make_plan
from halfplate.recipe import Recipe

QUICK = {"method": "rtn", "samples": 2, "seq_len": 16, "threads": 1}
RTN = create("rtn")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a tiny Llama whose widths are multiples of 256."""
    from conftest import build_model

    folder = tmp_path_factory.mktemp("fit") / "wide"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
    build_model("llama", vocab_size=len(tiny_tokenizer), **sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("600MB", 600_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("4gb", 4 * 10**9),
        ("12", 12),
        ("7 kB", 7000),
        (5, 5),
        (None, None),
    ],
)
def test_sizes_in_words(text: Any, nbytes: int | None) -> None:
    assert size_in_bytes("fit", text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "6 00MB", "10XB", "-1", "1e9", "nan", "1.MB", "9" * 16])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(HalfplateError, match=r"fit='.*' is not a size; expected a number with B, KB, MB"):
        Recipe.of(fit=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "1MB", "budget": 0.5}, "budget=0.5 and fit=1000000 exclude each other; leave one out"),
        ({"fit": "1MB", "fit_ram": "1GB"}, "exclude each other"),
        ({"fit": 0}, "fit=0 must be a number of bytes above 0"),
        ({"context": 100}, "context=100 is for a size in memory; give --fit-ram 4GB"),
        ({"fit_ram": "1GB", "context": 0}, "context=0 is out of range"),
        ({"target": "ollama"}, "target='ollama' is unknown"),
        (
            {"target": "vllm", "core_dtype": "nl4"},
            "target='vllm' cannot hold core_dtype='nl4' in groups of 128; use one of int4",
        ),
        ({"target": "gguf", "pattern": "2:4"}, "target='gguf' holds unpruned cores without wrappers"),
        (
            {"target": "gptq", "embedding_dtype": "auto"},
            "target='gptq' holds the embedding and the output layer as floats",
        ),
        ({"target": "gguf", "time_budget": 0.5}, "a time budget measures the kernels of Halfplate"),
    ],
)
def test_what_excludes_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HalfplateError, match=message):
        Recipe.of(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "0.1MB"}, r"fit=0\.1 MB cannot be met: the least is 0\.\d MB \(0\.\d MB for the embedding"),
        (
            {"fit": "0.3MB", "target": "vllm"},
            r"fit=0\.3 MB cannot be met: the least is .* with choose=core_dtype; raise it$",
        ),
        ({"fit_ram": "5MB"}, r"fit_ram=5\.0 MB cannot be met: the least is 6\d\d\.\d MB"),
        ({"fit_ram": "1GB", "target": "gptq"}, "fit_ram=1.00 GB is for the targets halfplate and gguf"),
    ],
)
def test_a_size_below_the_least_says_it(options: dict[str, Any], message: str, wide: Path, tmp_path: Path) -> None:
    with pytest.raises(HalfplateError, match=message):
        compress(str(wide), tmp_path / "out", Recipe.of(**options | QUICK))
    assert not (tmp_path / "out").exists()


def test_targets_refuse_models_that_they_cannot_hold(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1}
    tiny_model("qwen3_moe", vocab_size=len(tiny_tokenizer), **sizes).save_pretrained(tmp_path / "experts")
    tiny_model("mpt", vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "mpt")
    for folder in ("experts", "mpt"):
        tiny_tokenizer.save_pretrained(tmp_path / folder)
    with pytest.raises(HalfplateError, match=r"target='vllm' cannot hold experts \(model\.layers\.0\.mlp\.experts"):
        make_plan(str(tmp_path / "experts"), Recipe.of(target="vllm", seq_len=16))
    with pytest.raises(HalfplateError, match="mpt"):
        make_plan(str(tmp_path / "mpt"), Recipe.of(target="gguf", seq_len=16))


def test_candidates_are_what_a_target_holds() -> None:
    for d_in, target in ((256, "gguf"), (96, "gguf"), (256, "vllm"), (96, "gptq"), (96, "mlx")):
        spec = WeightSpec(64, d_in, DENSE, "int4", group=32)
        found = candidates(spec, RTN, ("core_dtype",), TARGETS[target])
        assert len(found) > 1
        assert all(TARGETS[target].holds(one) for one in found)
        costs = [TARGETS[target].nbytes(one) for one in found]
        assert costs == sorted(costs)
    names = {
        one.core_dtype for one in candidates(WeightSpec(64, 96, DENSE, "int4"), RTN, ("core_dtype",), TARGETS["gguf"])
    }
    assert {"affine4", "affine5"} <= names
    assert not any(name.endswith("k") for name in names)
    odd = WeightSpec(64, 40, DENSE, "int4")
    assert candidates(odd, RTN, ("core_dtype",), TARGETS["gguf"]) == [odd]
    assert TARGETS["gguf"].nbytes(odd) == odd.dense_nbytes
    assert table_candidates(odd, (), TARGETS["vllm"]) == [odd]


@pytest.mark.parametrize("core_dtype", ["int8", "int6k", "affine5k", "affine4k", "nl4", "nl4s", "int3k", "affine2k"])
def test_bytes_of_a_gguf_file_are_those_of_its_blocks(core_dtype: str) -> None:
    spec = WeightSpec(3, 512, DENSE, core_dtype, group=32)
    import torch

    core = NMSparse.from_dense(
        torch.randn(3, 512, generator=torch.Generator().manual_seed(0)), None, DENSE, core_dtype, 32
    )
    kind = block_type(spec)
    assert kind is not None
    assert TARGETS["gguf"].nbytes(spec) == kind.encode(core).nbytes


def test_what_other_programs_join_has_one_format() -> None:
    names = [f"m.0.self_attn.{one}_proj" for one in "qkvo"] + [f"m.0.mlp.{one}_proj" for one in ("gate", "up", "down")]
    assert [len(group) for group in TARGETS["vllm"].tied(names)] == [3, 1, 2, 1]
    experts = [f"m.0.mlp.experts.{number}.{one}_proj" for number in range(3) for one in ("gate", "up", "down")]
    assert [len(group) for group in TARGETS["gguf"].tied([*names, *experts])] == [1] * 7 + [3] * 3


def test_the_recipe_of_a_target() -> None:
    assert Recipe.of(target="gguf").core_dtype == "nl4"
    assert Recipe.of(target="vllm", fit="1GB").choose == ("core_dtype",)
    assert Recipe.of(fit="1GB", method="rtn").embedding_dtype == "auto"
    plain = Recipe.of(budget=0.5)
    assert not {"fit", "fit_ram", "context", "target"} & plain.fingerprint_json().keys()
    assert {"fit", "target"} <= Recipe.of(fit="1GB", target="gguf").fingerprint_json().keys()


def test_the_plan_shows_what_decides(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["plan", str(wide), "--no-benchmark", "--seq-len", "16"]
    assert main([*common, "--fit", "0.7MB", "--for", "gguf"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "asked for, as a GGUF file 0.70 MB" in said
    assert "less tokenizer" in said
    assert "affine4k (32) 0." in said
    assert "too large" in said
    assert "decided by the error of each candidate" in said
    assert main([*common, "--fit-ram", "1GB", "--context", "300"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in the memory of Halfplate 1,000.00 MB" in said
    assert "cache: room for 512 tokens × 1024 bytes" in said
    assert "scratch: 4 × (300 tokens × (4 × 256 + 3 × 512) + 320)" in said
    assert main([*common, "--fit-ram", "20MB", "--context", "300", "--for", "gguf", "--json"]) == 0
    limit = json.loads(capsys.readouterr().out)["limit"]
    assert (limit["target"], limit["of"], limit["nbytes"]) == ("gguf", "memory", 20_000_000)
    assert limit["outside"]["cache: 300 tokens × 512 bytes"] == 300 * 512


def _written(out: Path, target: str, folder: Path) -> int:
    """Bytes of the files that the target reads."""
    if target == "gguf":
        export(out, folder / "model.gguf", "gguf")
        return (folder / "model.gguf").stat().st_size
    if target != "halfplate":
        export(out, folder / "exported", "compressed-tensors" if target == "vllm" else target)
        out = folder / "exported"
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    return sum((out / name).stat().st_size for name in names)


@pytest.mark.parametrize(
    "target", ["gguf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("halfplate", "vllm", "gptq", "mlx"))]
)
def test_a_size_is_kept_and_used(target: str, wide: Path, tmp_path: Path) -> None:
    asked = {"gguf": 600_000, "halfplate": 600_000, "gptq": 800_000, "vllm": 1_250_000, "mlx": 900_000}[target]
    recipe = Recipe.of(fit=asked, target=target, **QUICK)
    summary = compress(str(wide), tmp_path / "out", recipe, check=False)
    # Of a model this small, the allowance for headers is a large part.
    assert 0.9 * asked < _written(tmp_path / "out", target, tmp_path) <= asked
    assert summary["fit"]["spent_bytes"] <= asked == summary["fit"]["nbytes"]
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    formats = {name: (entry["core_dtype"], entry.get("group")) for name, entry in modules.items()}
    assert len(set(formats.values())) > 1
    if target in ("vllm", "gptq"):
        for joined in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert len({entry for name, entry in formats.items() if name.endswith(joined)}) == 1
