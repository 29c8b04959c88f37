"""The embedding and the output layer on a grid: solved, stored once, loaded, run, counted, and taken back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import halfplate
from halfplate.compression import self_check, tables
from halfplate.errors import HalfplateError, RuinedResult
from halfplate.formats import CompressedEmbedding
from halfplate.methods import tables as solving
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe
from halfplate.runtime import explain, restore

IDS = torch.tensor([[1, 17, 40, 40, 300, 5]])
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
SMALL: dict[str, Any] = {
    "method": "armor",
    "pattern": "dense",
    "core_dtype": "int8",
    "block_size": 0,
    "samples": 4,
    "seq_len": 32,
    "threads": 1,
    "calibration": "self",
    "method_options": {"iterations": 1},
}


class Reading(LlamaForCausalLM):
    """A model that does more with its embedding than look up rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs), self.model.embed_tokens.weight.mean()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """`folder_of("tied")`: a tiny model with a head that is its embedding, `untied` with one of its own, `scaled` of Gemma 3."""
    from conftest import build_model

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "tied": ("llama", {"tie_word_embeddings": True}),
        "untied": ("llama", {"tie_word_embeddings": False}),
        "scaled": ("gemma3_text", {"tie_word_embeddings": True}),
    }
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            architecture, options = kinds[kind]
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            build_model(architecture, vocab_size=len(tiny_tokenizer), **options).save_pretrained(made[kind])
            tiny_tokenizer.save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def made(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`made(kind, **fields)`: the folder of the compressed model, and what `compress` returned; each is made once."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(kind: str, **fields: Any) -> tuple[Path, dict[str, Any]]:
        key = repr((kind, fields))
        if key not in done:
            out = tmp_path_factory.mktemp("out") / kind
            done[key] = out, halfplate.compress(str(folder_of(kind)), out, Recipe(**SMALL | fields))
        return done[key]

    return make


CASES = [
    ("tied", {"embedding_dtype": "int8"}),
    ("untied", {"embedding_dtype": "int8", "head_dtype": "int4"}),
    ("untied", {"head_dtype": "int4"}),
    ("scaled", {"head_dtype": "auto"}),
]


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.detach()
    return found


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_it_computes_what_its_tables_multiplied_out_compute(
    kind: str, fields: dict[str, Any], made: Callable[..., Any], tmp_path: Path
) -> None:
    out, summary = made(kind, **fields)
    assert summary["check"]["logit_error"] < 1e-4
    plain, fast = halfplate.load(out, kernels=False), halfplate.load(out)
    expected = logits(plain)
    assert torch.allclose(logits(fast), expected, atol=1e-4)
    stored = plain.get_input_embeddings()
    if "embedding_dtype" in fields or kind != "untied":
        assert isinstance(stored, CompressedEmbedding)
        assert stored.weight.dtype == torch.uint8
    fast.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(halfplate.load(tmp_path / "again", kernels=False)), expected)
    restore(fast)
    assert torch.equal(logits(fast), expected)
    tied = kind != "untied"
    dense = plain.dequantize(dtype=torch.float32)
    assert type(dense.get_input_embeddings()).__name__ == type(load_embedding(kind)).__name__
    assert (dense.get_input_embeddings().weight is dense.lm_head.weight) == dense.config.tie_word_embeddings == tied
    assert torch.allclose(logits(dense), expected, atol=1e-5)


def load_embedding(kind: str) -> Any:
    from conftest import build_model

    return build_model("gemma3_text" if kind == "scaled" else "llama").get_input_embeddings()


def test_the_table_is_near_the_original_and_all_bytes_are_counted(
    made: Callable[..., Any], folder_of: Callable[[str], Path]
) -> None:
    out, summary = made("tied", embedding_dtype="int8")
    table = load_dense(str(folder_of("tied"))).model.get_input_embeddings().weight
    rows = halfplate.load(out, kernels=False).get_input_embeddings()(torch.arange(len(table)))
    step = table.abs().amax(1, keepdim=True) / 127
    assert bool(((rows - table).abs() <= 3 * step).all())
    found = halfplate.inspect(out)
    weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert summary["nbytes"] == found["nbytes"]
    assert 0 < weights - found["nbytes"] - found["other_nbytes"] < 20_000  # the header
    assert found["other_nbytes"] == summary["other_nbytes"]
    by_name = {matrix["name"]: matrix for matrix in found["matrices"]}
    assert by_name[EMBEDDING]["nbytes"] == table.numel() + 2 * len(table)
    assert by_name[HEAD]["nbytes"] == 0
    plan = halfplate.plan(str(folder_of("tied")), Recipe(**SMALL, embedding_dtype="int8"))
    assert (plan.nbytes, plan.other_nbytes) == (found["nbytes"], found["other_nbytes"])


def test_the_gram_matrix_of_the_final_states_is_what_the_model_computes(folder_of: Callable[[str], Path]) -> None:
    from halfplate.models.sources import open_source
    from halfplate.models.streamed import StreamedModel

    model, seen = load_dense(str(folder_of("untied"))).model, []
    ids = torch.arange(4 * 32).reshape(4, 32) % 320
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32).double()))
    model(input_ids=ids)
    streamed = StreamedModel(open_source(str(folder_of("untied"))))
    found = tables._final_gram(streamed, ids, lambda *_: None)
    assert torch.allclose(found, seen[0].T @ seen[0] / len(seen[0]), rtol=1e-5, atol=1e-7)


def test_the_solver_leaves_less_on_the_logits_than_rounding() -> None:
    from halfplate.formats import WeightSpec
    from halfplate.methods.armor import Armor
    from halfplate.pattern import DENSE
    from halfplate.statistics import InputStatistics

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(512, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    weight, gram = torch.randn(40, 32, generator=generator), (states.T @ states / 512).double()
    statistics = solving.table_statistics(gram, tied=False)
    spec = WeightSpec(40, 32, DENSE, "int3", group=32)
    errors = []
    for known in (statistics, InputStatistics()):
        solved, record = solving.solve_table("head", weight, Armor(iterations=4), known, spec)
        error = float(((solved.dense() - weight) @ states.T).square().mean() / (weight @ states.T).square().mean())
        if known is statistics:
            assert record.relative_error == pytest.approx(error, rel=1e-3)
        errors.append(error)
    assert errors[0] < 0.5 * errors[1]


def test_many_rows_are_solved_a_few_at_a_time(
    folder_of: Callable[[str], Path], made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = made("tied", embedding_dtype="int8")
    monkeypatch.setattr(solving, "ROWS", 48)
    halfplate.compress(str(folder_of("tied")), tmp_path / "out", Recipe(**SMALL, embedding_dtype="int8"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def test_an_interrupted_run_keeps_the_tables(
    folder_of: Callable[[str], Path], made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfplate.compression import compress as main

    out, _ = made("tied", embedding_dtype="int8")
    recipe = Recipe(**SMALL, embedding_dtype="int8")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(main, "compress_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            halfplate.compress(str(folder_of("tied")), tmp_path / "out", recipe)
    monkeypatch.setattr(tables, "_solve", interrupted)
    halfplate.compress(str(folder_of("tied")), tmp_path / "out", recipe, resume=True)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_check_by_layer_sees_a_table_that_is_not_what_was_solved(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfplate.compression import compress as main

    recipe = Recipe(**SMALL, embedding_dtype="int8")
    monkeypatch.setattr(self_check, "check_loads_whole", lambda *_: False)
    assert halfplate.compress(str(folder_of(kind)), tmp_path / "sound", recipe)["check"]["loaded"] == "by layer"
    whole = main.assemble_weights

    def spoilt(streamed: Any, plan: Any, work: Any, folder: Path, *rest: Any) -> Any:
        from safetensors.torch import load_file, save_file

        checksums = whole(streamed, plan, work, folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{EMBEDDING}.weight_scales"] *= 1.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return checksums

    monkeypatch.setattr(main, "assemble_weights", spoilt)
    with pytest.raises(HalfplateError, match=f"{EMBEDDING}.weight in the written checkpoint is not"):
        halfplate.compress(str(folder_of(kind)), tmp_path / "out", recipe)


def test_a_model_is_compressed_while_it_is_loaded(folder_of: Callable[[str], Path], made: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    out, _ = made("tied", embedding_dtype="int8")
    config = halfplate.HalfplateConfig(recipe=Recipe(**SMALL, embedding_dtype="int8"), runtime=None)
    model = AutoModelForCausalLM.from_pretrained(folder_of("tied"), quantization_config=config)
    assert torch.equal(logits(model), logits(halfplate.load(out, kernels=False)))


def test_recovery_leaves_a_tied_head_with_its_embedding(
    made: Callable[..., Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out, _ = made("tied", embedding_dtype="int8")
    with suppress(RuinedResult):  # after writing: so few tokens may not lower the KL
        halfplate.recover(out, folder_of("tied"), tmp_path / "recovered", tokens=256, seq_len=32)
    model = halfplate.load(tmp_path / "recovered", kernels=False)
    assert model.lm_head.spec.same_as == EMBEDDING
    assert logits(model).isfinite().all()


def test_the_native_decoder_runs_with_both_tables(made: Callable[..., Any]) -> None:
    out, _ = made("tied", embedding_dtype="int8")
    fast, plain = halfplate.load(out), halfplate.load(out, kernels=False)
    if explain(fast).decoder != "native":
        pytest.skip(explain(fast).decoder)
    expected = plain.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(fast.generate(IDS, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("tied", {"embedding_dtype": "int8", "head_dtype": "int4"}, "the model's output layer is its embedding"),
        ("tied", {"embedding_dtype": "in8"}, "embedding_dtype='in8' is unknown; did you mean 'int8'"),
        ("tied", {"head_dtype": "bf16"}, "head_dtype='bf16' is unknown"),
        (
            "tied",
            {"embedding_dtype": "int8", "budget": 0.2, "block_size": "auto"},
            r"budget=0.2 cannot be met: the least is 0\.\d+ of the original bytes \(0\.\d+ of them the embedding",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    kind: str, fields: dict[str, Any], words: str, folder_of: Callable[[str], Path]
) -> None:
    with pytest.raises(HalfplateError, match=words):
        halfplate.plan(str(folder_of(kind)), Recipe(**SMALL | fields))


def test_a_table_of_another_kind_must_stay(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    from halfplate.planning import tables as planned

    monkeypatch.setattr(planned, "embedding_scale", lambda _: None)
    with pytest.raises(
        HalfplateError, match=r"embedding_dtype='int8': model.embed_tokens must stay as it is \(Embedding does more"
    ):
        halfplate.plan(str(folder_of("untied")), Recipe(**SMALL, embedding_dtype="int8"))
    plan = halfplate.plan(str(folder_of("untied")), Recipe(**SMALL, embedding_dtype="auto"))
    assert {m.name: m.reason for m in plan.matrices if m.skipped}[EMBEDDING].startswith("Embedding does more")

    class Shifted(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    from halfplate.formats.embedding import embedding_scale

    assert embedding_scale(Shifted(4, 8)) is None
    assert embedding_scale(nn.Embedding(4, 8)) == 1.0


def test_a_table_that_other_code_reads_must_stay(folder_of: Callable[[str], Path]) -> None:
    from halfplate.models.sources import open_source, skeleton
    from halfplate.planning.tables import plan_tables

    model = skeleton(open_source(str(folder_of("untied"))))
    recipe = Recipe(**SMALL, embedding_dtype="auto", head_dtype="int8")
    assert [table.spec is not None for table in plan_tables(model, recipe)] == [True, True]
    model.__class__ = Reading
    embedding, head = plan_tables(model, recipe)
    assert embedding.reason == "its weight is read as data by Reading.forward; not compressed"
    assert head.spec is not None


def test_tokens_outside_the_vocabulary_are_an_error(made: Callable[..., Any]) -> None:
    out, _ = made("tied", embedding_dtype="int8")
    embedding = halfplate.load(out, kernels=False).get_input_embeddings()
    with pytest.raises(IndexError, match="outside the vocabulary of 320"):
        embedding(torch.tensor([3, 320]))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_budget_chooses_the_tables_with_the_matrices(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = Recipe(
        **SMALL | {"core_dtype": "int4", "embedding_dtype": "auto", "head_dtype": "auto", "group_size": 32},
        budget=0.4,
        choose=("core_dtype",),
    )
    plan = halfplate.plan(str(folder_of(kind)), recipe)
    summary = halfplate.compress(str(folder_of(kind)), tmp_path / "out", recipe)
    assert summary["nbytes"] <= plan.nbytes_at_most == int(0.4 * plan.dense_nbytes)
    specs = {matrix["name"]: matrix["core_dtype"] for matrix in halfplate.inspect(tmp_path / "out")["matrices"]}
    # All of both tables in int8 would leave no room for four bits in every linear.
    assert specs[EMBEDDING] in ("int6", "int5", "int4", "nl4")
    assert (specs[HEAD] == specs[EMBEDDING]) or kind == "untied"
    assert halfplate.load(tmp_path / "out", kernels=False)(input_ids=IDS).logits.isfinite().all()
    with pytest.raises(
        HalfplateError, match=r"budget=0.2 cannot be met: the least is 0.4[0-9]+ of the original bytes \(0.1"
    ):
        halfplate.plan(
            str(folder_of(kind)), Recipe(**SMALL | {"embedding_dtype": "auto", "group_size": 32}, budget=0.2, choose=())
        )
