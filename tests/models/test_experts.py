"""Experts as linears: the same results as the 3-D tensors of transformers, however the files hold them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from causal_models import ARCHITECTURES, MLA, MOE
from conftest import build_model
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.models.experts import experts_of, joined_experts, linear_experts, recognised
from halfplate.models.experts.module import hits
from halfplate.models.linears import find_linears
from halfplate.models.sources import load_dense, open_source, skeleton
from halfplate.models.streamed import StreamedModel
from halfplate.recipe import Recipe
from halfplate.transforms.conversion import needs_conversion

DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
}
MIXTURES = {
    "qwen3_moe": MOE | {"head_dim": 8},
    **{name: options for name, (options, _) in ARCHITECTURES.items() if "num_experts_per_tok" in options},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "deepseek_v3": MOE | MLA,
    "deepseek_v2": MOE | MLA,
    "glm4_moe": MOE | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "minimax_m2": MOE | {"head_dim": 8},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2, "head_dim": 8},
    "llama4_text": MOE | {"head_dim": 8, "intermediate_size_mlp": 48, "num_experts_per_tok": 2},
    "dbrx": DBRX,
    "jetmoe": MOE | {"kv_channels": 8},
}
# By the form in their files: one by one, under two names; all in one tensor; that transposed, also interleaved and with biases.
# And in the rows of a matrix, and in a module below.
STORED = ("qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "aria_text", "dbrx", "jetmoe")
IDS = torch.arange(3, 35)[None]


def saved(architecture, tokenizer, folder, **more):
    model = build_model(architecture, **({"vocab_size": len(tokenizer)} | MIXTURES[architecture] | more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.no_grad()
def test_linears_give_the_results_of_the_original_and_can_be_joined_again(architecture):
    model = build_model(architecture, **MIXTURES[architecture])
    before, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(IDS).logits
    layouts = recognised(model)
    assert layouts
    linear_experts(model)
    assert not recognised(model)
    assert experts_of(model).keys() == layouts.keys()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    taken = {linear.name for linear in find_linears(model)[0]}
    for name, layout in layouts.items():
        assert {f"{name}.{layout.experts - 1}.{linear}" for linear in layout.linears} <= taken
    after = joined_experts(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_experts_that_return_their_input_are_not_linears(tiny_tokenizer, tmp_path):
    """LongCat has some at the end, and space for their weights in one of the two tensors."""
    model = tiny_models.build_model("longcat_flash")
    before, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(IDS).logits
    (name, layout), *_ = recognised(model).items()
    joined = layout.tensor("gate_up_proj")
    assert joined.spare > 0
    assert joined.shape[0] == layout.experts + joined.spare
    torch.testing.assert_close(linear_experts(model)(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    after = joined_experts(model).state_dict()
    assert torch.equal(
        after[f"{name}.gate_up_proj"][: layout.experts], before[f"{name}.gate_up_proj"][: layout.experts]
    )
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    streamed = StreamedModel(open_source(str(tmp_path)))
    whole = linear_experts(model).state_dict()
    assert streamed.stored.keys() | streamed.tied.keys() == whole.keys()
    assert all(torch.equal(streamed.read(name), whole[name]) for name in whole)


@pytest.mark.parametrize("architecture", ["llama4_text", "dbrx", "jetmoe", "qwen3_moe"])
@torch.no_grad()
def test_what_is_recorded_gives_the_output_of_the_experts(architecture):
    """One row for each token and expert, as many whatever the router chooses, with the inputs that the experts receive."""
    model, seen = linear_experts(build_model(architecture, **MIXTURES[architecture])), []
    module = next(iter(experts_of(model).values()))
    hook = module.register_forward_hook(lambda own, *call: seen.append(call), with_kwargs=True)
    model(IDS)
    hook.remove()
    (args, kwargs, output), tokens = seen[0], IDS.numel()
    call = module.recorded(args, kwargs)
    assert call.hidden.shape == (tokens * 2 // call.chosen.shape[1], 32)
    found = torch.zeros(tokens, 32)
    rows = call.hidden.shape[0] // tokens
    for row, (x, chosen, weights) in enumerate(zip(call.hidden, call.chosen, call.weights, strict=True)):
        for number, weight in zip(chosen.tolist(), weights, strict=True):
            found[row // rows] += weight * module.run(number, x[None])[0]
    expected = output.reshape(-1, tokens, 32).sum(0) - getattr(module, "bias", 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_that_do_not_fit_are_left_as_they_are():
    model = build_model("qwen3_moe", **MIXTURES["qwen3_moe"])
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:, :, 1:])
    assert "model.layers.0.mlp.experts" not in recognised(model)
    assert "model.layers.1.mlp.experts" in recognised(model)


@pytest.mark.parametrize("shape", [(5, 2), (1, 1), (64, 3)])
def test_the_tokens_of_every_expert(shape):
    chosen = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0))
    hit = hits(chosen, 5)
    found = {
        number: [(slot // shape[1], slot % shape[1]) for slot in slots.tolist()]
        for number, slots in zip(hit.numbers, hit.slots.split(hit.counts), strict=True)
    }
    # 5 stands for no expert.
    expected = {n: [(t, k) for t in range(shape[0]) for k in range(shape[1]) if chosen[t, k] == n] for n in range(5)}
    assert found == {number: rows for number, rows in expected.items() if rows}


@pytest.mark.parametrize("architecture", STORED)
def test_files_are_read_expert_by_expert(architecture, tiny_tokenizer, tmp_path):
    saved(architecture, tiny_tokenizer, tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    assert not needs_conversion(source)
    streamed, whole = StreamedModel(source), linear_experts(load_dense(source).model).state_dict()
    assert streamed.stored.keys() | streamed.tied.keys() == whole.keys()
    assert all(torch.equal(streamed.read(name), whole[name]) for name in whole)


def change(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize(
    ("architecture", "number", "reason"),
    [
        (
            "qwen3_moe",
            9,
            r"has shape \(8, 32\) in its file, config.json asks for \(9, 32\)",
        ),
        ("qwen3_moe", 7, r"hold model.layers.0.mlp.experts.7.down_proj.weight, .* does not have"),
        ("granitemoe", 9, r"has shape \(8, .* asks for \(9, "),
        ("gpt_oss", 7, r"has shape \(8, .* asks for \(7, "),
        ("mixtral", 10**9, r"num_local_experts=1000000000|its files can hold"),
    ],
)
def test_a_config_with_another_number_of_experts_is_one_line(architecture, number, reason, tiny_tokenizer, tmp_path):
    saved(architecture, tiny_tokenizer, tmp_path / "model")
    change(tmp_path / "model", num_experts=number, num_local_experts=number)
    with pytest.raises(HalfplateError, match=reason) as refused:
        skeleton(open_source(str(tmp_path / "model")))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tensors, name: tensors.pop(name), r"lack 1 tensors of its config.json \(model.layers.1.mlp.experts.5.gate_proj"),
        (lambda tensors, name: tensors.update({name: tensors[name][:5].clone()}), r"experts.5.gate_proj.weight has shape \(5, 32\)"),
        (lambda tensors, name: tensors[name].fill_(torch.nan), "experts.5.gate_proj.weight holds 1536 NaN"),
    ],
)  # fmt: skip
def test_a_damaged_expert_is_one_line(damage, reason, tiny_tokenizer, tmp_path):
    saved("mixtral", tiny_tokenizer, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    damage(tensors, "model.layers.1.block_sparse_moe.experts.5.w1.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(HalfplateError, match=reason) as refused:
        compress(str(tmp_path / "model"), tmp_path / "out", Recipe(method="magnitude", threads=1))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
