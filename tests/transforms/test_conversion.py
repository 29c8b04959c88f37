"""Tensors in another form than the model's: converted layer by layer, equal to a model that was loaded whole."""

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import build_model
from halfplate.compression.compress import compress
from halfplate.compression.transforming import transformed
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.experts import linear_experts
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.planning import make_plan
from halfplate.planning.making import plan_source
from halfplate.recipe import Recipe
from halfplate.telemetry.progress import NO_FACTS, silent
from halfplate.transforms import pieces_of
from halfplate.transforms.conversion import needs_conversion

EXPERTS = {"num_local_experts": 12, "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "n_routed_experts": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
# With more than ten experts, whose order by name is another than that by number.
FORMS = {
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "deepseek_v3": EXPERTS | MLA,
    "tied mixtral": EXPERTS | {"tie_word_embeddings": True},
    "gguf": {},
    "tied gguf": {"tie_word_embeddings": True},
}
RECIPE = Recipe(method="magnitude", threads=1)


@pytest.fixture(autouse=True)
def _by_conversion(monkeypatch):
    """Experts that are stored one by one are read without a conversion; here they stand for those that transformers makes otherwise."""
    monkeypatch.setattr("halfplate.models.experts.stored._one_by_one", lambda *_: None)


class Killed(BaseException):
    """Stands in for kill -9 where a test must know the moment."""


def saved(form, tokenizer, folder, **more):
    """A model in the form `form`, as a source."""
    architecture = form.removeprefix("tied ")
    options = {"vocab_size": len(tokenizer)} | FORMS[form] | more
    folder.mkdir(exist_ok=True)
    if architecture == "gguf":
        write_gguf(build_model("llama", **options), tokenizer, folder / "model.gguf", half=False)
        return open_source(str(folder / "model.gguf"))
    build_model(architecture, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(str(folder))


def converted(source, place, report=silent):
    work = WorkFolder(place)
    return transformed(source, plan_source(source, RECIPE).transforms, RECIPE, work, report)[1], work


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", "report.html")
    }


@pytest.mark.parametrize("form", FORMS)
def test_layer_by_layer_it_is_the_model_that_is_loaded_whole(form, tiny_tokenizer, tmp_path):
    source = saved(form, tiny_tokenizer, tmp_path / "model")
    assert needs_conversion(source)
    told = []
    result, _ = converted(source, tmp_path / "out", lambda phase, done, total, *_, **__: told.append((done, total)))
    streamed, whole = StreamedModel(result), linear_experts(load_dense(source).model).state_dict()
    assert streamed.stored.keys() | streamed.tied.keys() == whole.keys()
    assert bool(streamed.tied) == form.startswith("tied")
    assert all(torch.equal(streamed.read(name), whole[name]) for name in whole)
    assert told[-1] == (len(streamed.stored), len(streamed.stored))
    assert not needs_conversion(result)


def test_a_head_that_is_stored_in_place_of_the_embedding_is_both(tiny_tokenizer, tmp_path):
    saved("tied mixtral", tiny_tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, {"format": "pt"})
    source = open_source(str(tmp_path / "model"))
    streamed = StreamedModel(converted(source, tmp_path / "out")[0])
    assert torch.equal(streamed.read("model.embed_tokens.weight"), tensors["lm_head.weight"])
    assert torch.equal(streamed.read("lm_head.weight"), tensors["lm_head.weight"])


class Held(TorchDispatchMode):
    """The most bytes that tensors made while it is active hold at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.alive = {storage: nbytes for storage, nbytes in self.alive.items() if not storage.expired()}
        for tensor in found if isinstance(found, list | tuple) else [found]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.most = max(self.most, sum(self.alive.values()))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mixtral", "gguf"])
def test_no_more_is_held_than_the_plan_says_which_is_two_layers(form, tiny_tokenizer, tmp_path, monkeypatch):
    """A model that is loaded whole holds all its layers."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # tensors of other threads are not seen
    source = saved(form, tiny_tokenizer, tmp_path / "model", num_hidden_layers=6)
    with Held() as loading:
        loaded = load_dense(source)
    layer = max(piece.nbytes for piece in pieces_of(linear_experts(loaded.model)) if piece.index is not None)
    del loaded
    (step,) = plan_source(source, RECIPE).transforms
    outer = 4 * len(tiny_tokenizer) * 32
    assert step.memory == 2 * max(layer, outer)
    with Held() as converting:
        converted(source, tmp_path / "out")
    assert 0.3 * step.memory < converting.most <= step.memory < loading.most / 2


def test_the_plan_counts_memory_and_disk(tiny_tokenizer, tmp_path):
    source = saved("mixtral", tiny_tokenizer, tmp_path / "model")
    plan = make_plan(source.name, RECIPE)
    (step,) = plan.transforms
    _, work = converted(source, tmp_path / "out")
    written = sum(path.stat().st_size for path in work.path.rglob("*.safetensors"))
    assert step.disk <= written <= step.disk + 2000 * 3 + 150 * 2 * 36
    assert plan.disk.transformed == step.disk
    assert plan.memory.phases["transforming"] - plan.memory.phases["reading"] == step.memory - 6 * plan.sizes.largest
    assert plan.to_json()["transforms"] == [
        {"name": "conversion@2", "automatic": True, "memory_bytes": step.memory, "disk_bytes": step.disk}
    ]


@pytest.mark.parametrize(
    ("form", "damage"), [("mixtral", "none"), ("gguf", "flipped"), ("gguf", "cut"), ("gguf", "note")]
)
def test_finished_pieces_are_kept_and_damaged_ones_made_anew(form, damage, tiny_tokenizer, tmp_path):
    source = saved(form, tiny_tokenizer, tmp_path / "model", num_hidden_layers=3)
    whole = digests(converted(source, tmp_path / "whole")[1].path)

    def kill(phase, done, total, note="", share=None, facts=NO_FACTS):
        if 2 * done > total:
            raise Killed

    with pytest.raises(Killed):
        converted(source, tmp_path / "out", kill)
    work = WorkFolder(tmp_path / "out")
    kept = sorted(work.path.rglob("*.safetensors"))
    assert 1 < len(kept) < 4
    if damage == "note":
        kept[0].with_suffix(".json").unlink()
    elif damage != "none":
        content = bytearray(kept[0].read_bytes())
        content[-3] ^= 1
        kept[0].write_bytes(content if damage == "flipped" else content[:-3])
    before = {path: path.stat().st_mtime_ns for path in kept}
    converted(source, tmp_path / "out")
    assert [path for path in kept if path.stat().st_mtime_ns != before[path]] == ([] if damage == "none" else kept[:1])
    assert digests(work.path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mixtral", "gguf"])
def test_a_compression_that_is_killed_while_it_converts_gives_the_same_bytes(form, tiny_tokenizer, tmp_path):
    source = saved(form, tiny_tokenizer, tmp_path / "model")
    compress(source.name, tmp_path / "whole", RECIPE, check=False)

    def kill(phase, done, total, note="", share=None, facts=NO_FACTS):
        if phase == "transforming" and done:
            raise Killed

    with pytest.raises(Killed):
        compress(source.name, tmp_path / "out", RECIPE, report=kill)
    (kept,) = WorkFolder(tmp_path / "out").path.rglob("*.safetensors")
    shutil.copy2(kept, tmp_path / "kept")
    with pytest.raises(HalfplateError, match=r"left its finished files .*--resume"):
        compress(source.name, tmp_path / "out", RECIPE)

    def seen(phase, done, total, note="", share=None, facts=NO_FACTS):
        if phase == "reading" and total > 1 and not done:
            assert kept.stat().st_mtime_ns == (tmp_path / "kept").stat().st_mtime_ns

    compress(source.name, tmp_path / "out", RECIPE, report=seen, resume=True, check=False)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def changed(tmp_path, name, change):
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors, name: tensors.pop(name), "cannot be made of its parts|has shape"),
        (
            lambda tensors, name: tensors.__setitem__(name, tensors[name][:5].clone()),
            "model.layers.1.mlp.experts.gate_up_proj cannot be made of its parts",
        ),
        (
            lambda tensors, name: tensors[name].fill_(torch.nan),
            r"model.layers.1.mlp.experts.11.gate_proj.weight holds 1536 NaN",
        ),
    ],
)
def test_a_damaged_expert_is_one_line(change, reason, tiny_tokenizer, tmp_path):
    saved("mixtral", tiny_tokenizer, tmp_path / "model")
    changed(tmp_path, "model.layers.1.block_sparse_moe.experts.11.w1.weight", change)
    with pytest.raises(HalfplateError, match=reason) as refused:
        compress(str(tmp_path / "model"), tmp_path / "out", RECIPE)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
