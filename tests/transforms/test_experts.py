"""Pruning experts: what stays and why, by hand; ordinary models under the names of their family; the router alone trained; refusals."""

import json
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halfplate
from causal_models import MLA, MOE
from conftest import build_model
from halfplate.cli import main
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.models.experts import experts_of, linear_experts
from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms import TRANSFORMS, find
from halfplate.transforms.structure.clusters import AVERAGE, COMPLETE, clustered
from halfplate.transforms.structure.experts import OUTPUT, SALIENCY, TOKENS, Routes
from halfplate.transforms.structure.mixture import Mixture
from structured_models import IDS, logits, pruned, tokens

METHODS = ("reap", "stun", "expert-frequency", "expert-merge")
GROUPED = MOE | MLA | {"n_group": 2, "topk_group": 1}
KINDS = {
    "qwen3_moe": MOE | {"head_dim": 8, "norm_topk_prob": True},
    "mixtral": MOE,
    "olmoe": MOE,
    "gpt_oss": MOE | {"head_dim": 8},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "deepseek_v2": GROUPED | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": GROUPED,
    "glm4_moe": MOE | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "head_dim": 8},
}
TEXT = {"samples": 4, "seq_len": 16, "threads": 1}


def saved(tokenizer, folder, architecture="qwen3_moe", **more):
    options = {name: value for name, value in (KINDS[architecture] | more).items() if value is not None}
    model = build_model(architecture, vocab_size=len(tokenizer), **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(str(folder))


def share(source, experts):
    """The keep with which so many experts stay."""
    mixture = Mixture.of(source)
    return mixture.parameters(experts) / mixture.parameters() + 1e-7


def inside(model, layer):
    """The experts module of a layer, whose experts are linears, and the names of the tensors with a row for each expert."""
    name = next(name for name in experts_of(model) if f".{layer}." in name)
    rows = [
        key
        for key, tensor in model.state_dict().items()
        if key.startswith(name.rpartition(".")[0]) and len(tensor) == 8
    ]
    return name, [key for key in rows if key.rpartition(".")[0].endswith(("gate", "router"))]


def calls(source, layer):
    """The arguments of the experts of a layer on the calibration tokens: inputs, the experts of each token, and their weights."""
    model, seen = linear_experts(load_dense(source).model), []
    name, rows = inside(model, layer)
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, args: seen.extend(args))
    with torch.no_grad():
        model(tokens(source).ids, use_cache=False)
    hook.remove()
    hidden, chosen, weights = seen
    return model, module, hidden.reshape(-1, hidden.shape[-1]), chosen, weights, (name, rows)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", KINDS)
def test_all_experts_are_the_same_model(tiny_tokenizer, tmp_path, architecture, name):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture)
    result = pruned(source, tmp_path / "out", name, 1.0)
    torch.testing.assert_close(logits(result), load_dense(source).model(IDS).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_statistics_by_hand(tiny_tokenizer, tmp_path, architecture):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture)
    _, module, x, chosen, weights, _ = calls(source, 1)
    probe = Routes(outputs=True)
    hooks = probe.watch(torch.nn.ModuleDict({"experts": module}))
    with torch.no_grad():
        # Three batches of tokens.
        for part in zip(x.split(50), chosen.split(50), weights.split(50), strict=True):
            module(*part)
        outputs = [module.run(number, x) for number in range(8)]
    for hook in hooks:
        hook.remove()
    found = probe.statistics()
    counts, sums = [0] * 8, [0.0] * 8
    for token in range(len(x)):
        for slot, number in enumerate(chosen[token].tolist()):
            counts[number] += 1
            sums[number] += float(weights[token, slot]) * float(outputs[number][token].norm())
    assert found[TOKENS].tolist() == counts
    expected = [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
    torch.testing.assert_close(found[SALIENCY], torch.tensor(expected), rtol=1e-4, atol=1e-6)
    sample = [row for start in range(0, len(x), 50) for row in range(start, min(start + 50, len(x)), 4)]
    expected = torch.stack([output[sample].mean(0) for output in outputs])
    torch.testing.assert_close(found[OUTPUT], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["reap", "expert-frequency"])
@pytest.mark.parametrize("architecture", KINDS)
def test_the_best_experts_stay_with_their_rows_of_the_router(tiny_tokenizer, tmp_path, architecture, name):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture)
    result = pruned(source, tmp_path / "out", name, share(source, 6))
    assert Mixture.of(result).experts == 6
    assert result.config.num_experts_per_tok == 2
    model, module, x, chosen, weights, (experts, rows) = calls(source, 1)
    scores = []
    for number in range(8):
        hit, slot = (chosen == number).nonzero(as_tuple=True)
        norms = module.run(number, x[hit]).norm(dim=1)
        score = float((weights[hit, slot] * norms).mean()) if len(hit) else 0.0
        scores.append(score if name == "reap" else len(hit))
    groups = [range(4), range(4, 8)] if "deepseek" in architecture else [range(8)]
    each = 6 // len(groups)
    kept = [n for group in groups for n in sorted(sorted(group, key=lambda n: -scores[n])[:each])]
    found, state = StreamedModel(result), model.state_dict()
    assert rows
    for row in rows:
        torch.testing.assert_close(found.read(row), state[row][kept].float(), rtol=0, atol=0)
    for number, original in enumerate(kept):
        for linear in module.layout.linears:
            expected = state[f"{experts}.{original}.{linear}.weight"]
            torch.testing.assert_close(found.read(f"{experts}.{number}.{linear}.weight"), expected, rtol=0, atol=0)
    assert bool(logits(result).isfinite().all())


def test_stun_keeps_one_expert_of_each_cluster(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "stun", share(source, 3))
    model, module, _, chosen, _, (_, rows) = calls(source, 1)
    router = model.state_dict()[rows[0]].double()
    apart = lambda a, b: float((router[a] - router[b]).norm())  # noqa: E731
    clusters = [[number] for number in range(8)]
    while len(clusters) > 3:
        pairs = combinations(clusters, 2)
        one, other = min(pairs, key=lambda pair: max(apart(a, b) for a in pair[0] for b in pair[1]))
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [sorted(one + other)]
    weights = [torch.cat([p.flatten() for p in module.expert(number).parameters()]).double() for number in range(8)]
    kept = []
    for cluster in clusters:
        mean = torch.stack([weights[number] for number in cluster]).mean(0)
        far = {number: float((weights[number] - mean).norm()) for number in cluster}
        tokens_of = {number: int((chosen == number).sum()) for number in cluster}
        kept.append(min(cluster, key=far.get) if len(cluster) > 2 else max(cluster, key=tokens_of.get))
    found = StreamedModel(result)
    torch.testing.assert_close(found.read(rows[0]).double(), router[sorted(kept)], rtol=0, atol=0)


def test_merging_averages_clusters_by_their_tokens(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "expert-merge", share(source, 4))
    model, _, x, chosen, _, (experts, rows) = calls(source, 1)
    model_state, found = model.state_dict(), StreamedModel(result)
    counts = [float((chosen == number).sum()) for number in range(8)]
    router, merged = model_state[rows[0]].double(), found.read(rows[0]).double()
    outputs = []
    with torch.no_grad():
        module = model.get_submodule(experts)
        starts = range(0, len(x), 12 * 8)  # a batch of the measuring
        sample = torch.cat([x[start : start + 96][::4] for start in starts])
        outputs = torch.stack([module.run(number, sample).double().mean(0) for number in range(8)])
    clusters = clustered(torch.cdist(outputs, outputs), 4, AVERAGE)
    for number, cluster in enumerate(clusters):
        total = sum(counts[member] for member in cluster)
        row = sum(counts[member] / total * router[member] for member in cluster)
        torch.testing.assert_close(merged[number], row, rtol=1e-5, atol=1e-6)
        key = f"{experts}.{{}}.down_proj.weight"
        expected = sum(counts[member] / total * model_state[key.format(member)] for member in cluster)
        torch.testing.assert_close(found.read(key.format(number)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linkage", [COMPLETE, AVERAGE])
def test_clusters_against_loops(linkage):
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    distances = torch.cdist(points, points).double()
    clusters = [[number] for number in range(9)]
    for count in range(8, 0, -1):
        one, other = min(
            combinations(clusters, 2),
            key=lambda pair: float(linkage(torch.tensor([float(distances[a, b]) for a in pair[0] for b in pair[1]]))),
        )
        clusters = sorted([*(cluster for cluster in clusters if cluster not in (one, other)), sorted(one + other)])
        assert clustered(distances, count, linkage) == clusters


def test_of_two_copies_one_stays(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    model = load_dense(source).model
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            for tensor in (mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight):
                tensor[4:] = tensor[:4]
    model.save_pretrained(tmp_path / "copies")
    tiny_tokenizer.save_pretrained(tmp_path / "copies")
    copies = open_source(str(tmp_path / "copies"))
    found = StreamedModel(pruned(copies, tmp_path / "out", "stun", share(copies, 4)))
    rows = found.read("model.layers.0.mlp.gate.weight")
    original = model.model.layers[0].mlp.gate.weight[:4]
    assert sorted(rows.sum(1).tolist()) == pytest.approx(sorted(original.sum(1).tolist()))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_command_writes_what_the_family_publishes(tiny_tokenizer, tmp_path, capsys, architecture):
    source, out = saved(tiny_tokenizer, tmp_path / "model", architecture), tmp_path / "out"
    keep = share(source, 6)
    command = ["prune", source.name, "-o", str(out), "--keep", f"{keep:.8f}", "--method", "reap", "--samples", "4"]
    assert main([*command, "--seq-len", "16", "--threads", "1", "--quiet", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["parameters"] <= keep * summary["dense_parameters"]
    assert "6 of 8 experts in a layer" in summary["pruned"]["told"]
    assert ("3 in each group" in summary["pruned"]["told"]) == (architecture == "deepseek_v3")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() <= summary["parameters"]
    expected = pruned(source, tmp_path / "made", "reap", keep)
    assert Mixture.of(expected).experts == model.model.layers[1].mlp.experts.num_experts == 6
    # The same names as in the original, for fewer experts.
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", out))
    assert after.keys() <= before.keys()
    gone = before.keys() - after.keys()
    assert all(".experts.6." in name or ".experts.7." in name for name in gone)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "olmoe"])
def test_gguf_holds_fewer_experts(tiny_tokenizer, tmp_path, architecture):
    own = {} if architecture == "qwen3_moe" else {"moe_intermediate_size": None}
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, num_key_value_heads=4, **own)
    halfplate.prune(source.name, tmp_path / "out", share(source, 5), transforms=["reap"], check=False, **TEXT)
    halfplate.export(tmp_path / "out", tmp_path / "model.gguf", format="gguf", embedding_type="f32")
    again = load_dense(str(tmp_path / "model.gguf")).model
    assert Mixture.of(open_source(str(tmp_path / "model.gguf"))).experts == 5
    expected = load_dense(str(tmp_path / "out")).model(IDS).logits
    assert float((again(IDS).logits - expected).norm() / expected.norm()) < 5e-3


def test_then_weights_are_pruned_and_the_router_alone_is_trained(tiny_tokenizer, tmp_path):
    model = load_dense(saved(tiny_tokenizer, tmp_path / "small")).model
    with torch.no_grad():
        for layer in model.model.layers:  # so that it matters where tokens go
            layer.mlp.experts.down_proj.mul_(8)
            layer.mlp.gate.weight.mul_(4)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    halfplate.prune(source.name, tmp_path / "stun", share(source, 6), transforms=["stun"], check=False, **TEXT)
    recipe = {"method": "wanda", "pattern": "2:4"}
    halfplate.compress(tmp_path / "stun", tmp_path / "sparse", check=False, benchmark=False, **recipe, **TEXT)
    text = tmp_path / "text.txt"
    text.write_text("The bird saw a red ball near the house, and it wanted to play. " * 60)
    options = {"tokens": 4096, "seq_len": 32, "text": str(text), "batch": 4, "learning_rate": 3e-3, "precision": "fp32"}
    for folder in ("stun", "sparse"):
        out = tmp_path / f"{folder}-recovered"
        found = halfplate.recover(tmp_path / folder, source.name, out, **options, train="router")
        assert found["trained_parameters"] == 2 * 6 * 32
        assert found["after"]["kl"] < found["before"]["kl"]
        read = halfplate.load if folder == "sparse" else lambda path: load_dense(str(path)).model
        first, second = (read(path).state_dict() for path in (tmp_path / folder, out))
        changed = {name for name in first if not torch.equal(first[name], second[name])}
        assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    # All else is trained with the experts, too.
    found = halfplate.recover(tmp_path / "stun", source.name, tmp_path / "all", **options)
    assert found["trained_parameters"] > 2 * 6 * 3 * 16 * 32
    assert found["after"]["kl"] < found["before"]["kl"]


@torch.no_grad()
def test_compress_prunes_experts_first(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    recipe = {"method": "rtn", "core_dtype": "int8", "group_size": 16, "pattern": "dense"}
    halfplate.compress(source.name, tmp_path / "out", transforms=["reap"], keep=share(source, 5), **recipe, **TEXT)
    halfplate.prune(source.name, tmp_path / "pruned", share(source, 5), transforms=["reap"], **TEXT)
    model = halfplate.load(tmp_path / "out", kernels=False)
    expected = load_dense(str(tmp_path / "pruned")).model(IDS).logits
    assert float((model(IDS).logits - expected).norm() / expected.norm()) < 0.05


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[0]


def test_bad_input_is_one_line_before_any_work(tiny_tokenizer, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    source = saved(tiny_tokenizer, tmp_path / "model")

    def error(folder, keep, method="reap"):
        return refused(capsys, "prune", folder, "-o", out, "--keep", keep, "--method", method)

    least = Mixture.of(source).parameters(2) / Mixture.of(source).parameters()
    found = error(source.name, f"{share(source, 1):.8f}", "stun")
    assert f"leaves 1 of 8 experts in a layer, and each token goes to 2; keep at least {least:.3f}"[:-1] in found
    assert "leaves no expert, and each token goes to 2" in error(source.name, "0.1")
    grouped = saved(tiny_tokenizer, tmp_path / "grouped", "deepseek_v3")
    found = error(grouped.name, f"{share(grouped, 3):.8f}", "expert-merge")
    assert "leaves 2 of 8 experts in a layer, and each token goes to 2, chosen from some of 2 groups; keep" in found
    dense = build_model("llama", vocab_size=len(tiny_tokenizer))
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    found = error(tmp_path / "dense", "0.9", "reap")
    assert "it has no experts that a router chooses from; to remove channels, heads or layers, use flap" in found
    other = build_model("phimoe", vocab_size=len(tiny_tokenizer), **MOE)
    other.save_pretrained(tmp_path / "phimoe")
    tiny_tokenizer.save_pretrained(tmp_path / "phimoe")
    assert "which tensors of a phimoe model its router has for each expert; expected one of deepseek_v2" in error(
        tmp_path / "phimoe", "0.9"
    )
    monkeypatch.setattr(
        "halfplate.transforms.structure.mixture.tied_names",
        lambda model: {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"},
    )
    assert "shares tensors with other experts, so that none can go alone" in error(source.name, "0.9")
    halfplate.prune(tmp_path / "dense", tmp_path / "narrow", 0.9, transforms=["magnitude-structured"], check=False)
    found = refused(
        capsys,
        "recover",
        tmp_path / "narrow",
        "--teacher",
        tmp_path / "dense",
        "-o",
        out,
        "--train",
        "router",
        "--tokens",
        "64",
    )
    assert "train='router': the model has no router of experts" in found
    with pytest.raises(HalfplateError, match="it has no experts that a router chooses from"):
        halfplate.plan(tmp_path / "dense", transforms=["expert-frequency"], keep=0.9)
    assert not out.exists()
    assert not WorkFolder(out).path.exists()


def test_every_method_is_listed():
    assert set(METHODS) <= set(TRANSFORMS.names())
    assert all(find(name).shrinks for name in METHODS)
