"""Structured pruning: the same model if everything stays, units cut by hand, statistics from a whole forward pass, and refusals."""

from itertools import pairwise

import pytest
import torch

from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms import find
from halfplate.transforms.structure.graph import CHANNELS, HEADS, PAIRS, StructureGraph
from halfplate.transforms.structure.least_squares import refitted
from halfplate.transforms.structure.modegpt import RIDGE, directions, leverage
from halfplate.transforms.structure.widths import step_of
from structured_models import IDS, KINDS, hidden_states, kept_by_hand, logits, pruned, saved

METHODS = ("depth", "magnitude-structured", "wanda-structured", "flap", "cfsp", "tyr", "nirvana", "slicegpt", "modegpt")


def parameters(source):
    return StructureGraph.of(source).parameters()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_all_of_it_is_the_same_model(tiny_tokenizer, tmp_path, name, architecture, options):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, **options)
    if name == "slicegpt" and (architecture == "qwen2" or options.get("tie_word_embeddings")):
        pytest.skip("a head of its own does not fit, or the heads would become narrower")
    result = pruned(source, tmp_path / "out", name, 1.0)
    torch.testing.assert_close(logits(result), load_dense(source).model(IDS).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_the_result_has_at_most_that_many_parameters(tiny_tokenizer, tmp_path, name, architecture, options):
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, **options)
    transform = find(name).keeping(0.75)
    if architecture == "qwen2" and name == "slicegpt":
        assert "no head_dim" in transform.refusal(source)
        return
    result = pruned(source, tmp_path / "out", name, 0.75)
    model = StreamedModel(result)
    found = sum(model.read(name).numel() for name in model.stored)
    assert found == parameters(result) == transform.target(source).parameters
    assert 0.4 * parameters(source) < found <= 0.75 * parameters(source)
    assert bool(logits(result).isfinite().all())
    widths = {side for name in model.stored if name.endswith("proj.weight") for side in model.shape(name)}
    assert all(width % 32 == 0 for width in widths)


@pytest.mark.parametrize("name", ["wanda-structured", "flap", "slicegpt"])
def test_a_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral(tiny_tokenizer, tmp_path, name):
    """transformers refuses such a Llama when it loads one; biases, which a Mistral has not, leave fewer sizes."""
    keep = 0.85 if name == "slicegpt" else 0.62
    options = {"num_attention_heads": 10, "num_key_value_heads": 10, "hidden_size": 160}
    source = saved(tiny_tokenizer, tmp_path / "model", **options)
    result = pruned(source, tmp_path / "out", name, keep)
    config = result.config
    divided = config.hidden_size % config.num_attention_heads == 0
    assert config.model_type == ("llama" if divided else "mistral")
    assert divided == (name == "flap")
    loaded = type(config).from_dict(config.to_dict())
    assert loaded.head_dim == 16
    assert bool(logits(result).isfinite().all())


def test_steps_of_widths():
    """Divisors for groups and for GGUF types stay where they cost at most a 32nd of the width."""
    widths = {
        48: 16,
        128: 32,
        1536: 32,
        2048: 64,
        4096: 128,
        8192: 256,
        11008: 256,
        14336: 256,
        28672: 256,
        18944: 256,
        8960: 256,
        100: 4,
    }
    assert {width: step_of(width) for width in widths} == widths


def cut_by_hand(model, layer, heads, channels):
    """The tensors of a layer with these heads of k and v, and these channels: a list of rows or columns at a time."""
    config, block = model.config, model.model.layers[layer]
    queries, head = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    of_k = [unit * head + at for unit in heads for at in range(head)]
    of_q = [(unit * queries + query) * head + at for unit in heads for query in range(queries) for at in range(head)]
    attention, mlp = block.self_attn, block.mlp
    return {
        "self_attn.q_proj.weight": attention.q_proj.weight[of_q],
        "self_attn.k_proj.weight": attention.k_proj.weight[of_k],
        "self_attn.v_proj.weight": attention.v_proj.weight[of_k],
        "self_attn.v_proj.bias": attention.v_proj.bias[of_k],
        "self_attn.o_proj.weight": attention.o_proj.weight[:, of_q],
        "mlp.gate_proj.weight": mlp.gate_proj.weight[channels],
        "mlp.up_proj.bias": mlp.up_proj.bias[channels],
        "mlp.down_proj.weight": mlp.down_proj.weight[:, channels],
    }


@pytest.mark.parametrize("name", ["magnitude-structured", "wanda-structured", "flap"])
def test_scores_and_cuts_by_hand(tiny_tokenizer, tmp_path, name):
    source = saved(tiny_tokenizer, tmp_path / "model", attention_bias=True, mlp_bias=True)
    result = pruned(source, tmp_path / "out", name, 0.6)
    sizes = find(name).keeping(0.6).target(source).sizes
    assert (
        (sizes[HEADS], sizes[CHANNELS])
        == (2, 64)
        == (result.config.num_key_value_heads, result.config.intermediate_size)
    )
    assert (result.config.num_attention_heads, result.config.head_dim) == (4, 16)
    found, (model, inputs) = StreamedModel(result), hidden_states(source)
    for layer in range(4):
        block = model.model.layers[layer]
        columns = {}
        for module in ("mlp.down_proj", "self_attn.o_proj"):
            x, weight = inputs[f"model.layers.{layer}.{module}"][0], block.get_submodule(module).weight.double()
            columns[module] = []
            for column in range(weight.shape[1]):
                values = x[:, column]
                if name == "flap":
                    score = ((values - values.mean()) ** 2).mean() * (weight[:, column] ** 2).sum()
                else:
                    score = (values**2).mean().sqrt() * weight[:, column].abs().sum()
                columns[module].append(float(score))
        of_channels, of_inputs = columns["mlp.down_proj"], columns["self_attn.o_proj"]
        of_heads = [sum(of_inputs[32 * head : 32 * (head + 1)]) for head in range(4)]
        if name == "magnitude-structured":
            of_channels, of_heads = owned_by_hand(block)
        heads, channels = kept_by_hand(of_heads, 2), kept_by_hand(of_channels, 64)
        for inner, expected in cut_by_hand(model, layer, heads, channels).items():
            torch.testing.assert_close(found.read(f"model.layers.{layer}.{inner}"), expected, rtol=0, atol=0)
        removed = [channel for channel in range(128) if channel not in channels]
        bias = block.mlp.down_proj.bias.double()
        if name == "flap":
            means = inputs[f"model.layers.{layer}.mlp.down_proj"][0][:, removed].mean(0)
            bias = bias + block.mlp.down_proj.weight.double()[:, removed] @ means
        torch.testing.assert_close(
            found.read(f"model.layers.{layer}.mlp.down_proj.bias").double(), bias, rtol=0, atol=1e-5
        )


def owned_by_hand(block):
    """The squared norms of all weights of each channel and of each head of k and v."""
    mlp, attention = block.mlp, block.self_attn
    channels = [
        float(
            (mlp.gate_proj.weight[at] ** 2).sum()
            + (mlp.up_proj.weight[at] ** 2).sum()
            + (mlp.down_proj.weight[:, at] ** 2).sum()
        )
        for at in range(128)
    ]
    heads = []
    for head in range(4):
        wide, narrow = slice(32 * head, 32 * (head + 1)), slice(16 * head, 16 * (head + 1))
        parts = attention.q_proj.weight[wide], attention.k_proj.weight[narrow], attention.v_proj.weight[narrow]
        heads.append(sum(float((part**2).sum()) for part in (*parts, attention.o_proj.weight[:, wide])))
    return channels, heads


def test_flap_keeps_the_mean_of_a_linear_without_bias(tiny_tokenizer, tmp_path):
    """Llama models without biases get them, and the mean output of down stays that of the original on the same inputs."""
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "flap", 0.6)
    assert result.config.mlp_bias
    assert result.config.attention_bias
    found, (model, inputs) = StreamedModel(result), hidden_states(source)
    assert not bool(found.read("model.layers.0.mlp.up_proj.bias").any())
    down, weight = "model.layers.0.mlp.down_proj", model.model.layers[0].mlp.down_proj.weight.double()
    x, out = inputs[down]
    kept = [int((weight == column[:, None]).all(0).nonzero()) for column in found.read(f"{down}.weight").double().T]
    mean = x[:, kept].mean(0) @ found.read(f"{down}.weight").double().T + found.read(f"{down}.bias").double()
    torch.testing.assert_close(mean, out.mean(0), rtol=0, atol=1e-5)
    other = saved(tiny_tokenizer, tmp_path / "mistral", "mistral")
    assert "model.layers.0.mlp.down_proj.bias" not in StreamedModel(pruned(other, tmp_path / "two", "flap", 0.7)).stored


def test_depth_removes_the_layers_that_turn_least(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "depth", 0.7)
    model, inputs = hidden_states(source)
    states = [inputs[f"model.layers.{layer}.input_layernorm"][0] for layer in range(4)] + [inputs["model.norm"][0]]
    angles = []
    for first, last in pairwise(states):
        rows = zip(first, last, strict=True)
        angles.append(sum(float(torch.acos(a @ b / a.norm() / b.norm())) for a, b in rows))
    count = result.config.num_hidden_layers
    assert count == 2
    kept = kept_by_hand(angles, count)
    found, state = StreamedModel(result), model.state_dict()
    for index, original in enumerate(kept):
        name = f"model.layers.{index}.mlp.up_proj.weight"
        assert torch.equal(found.read(name), state[f"model.layers.{original}.mlp.up_proj.weight"])


def test_slices_are_the_principal_components_of_what_the_norms_return(tiny_tokenizer, tmp_path):
    source = saved(tiny_tokenizer, tmp_path / "model")
    result = pruned(source, tmp_path / "out", "slicegpt", 0.6)
    assert result.config.hidden_size == 32
    model, inputs = hidden_states(source)
    units = []
    for name, (x, _) in inputs.items():
        if "norm" in name:
            units.append(x / (x**2).mean(1, keepdim=True).sqrt())
    gram = sum(x.T @ x for x in units)
    found = StreamedModel(result)
    # The rows of the embedding that no token of another text moves lie in the span of the components.
    basis = torch.linalg.eigh(gram).eigenvectors[:, 32:]
    embedding = model.model.embed_tokens.weight.double()
    expected = (embedding @ basis) @ (embedding @ basis).T
    sliced = found.read("model.embed_tokens.weight").double()
    torch.testing.assert_close(sliced @ sliced.T, expected, rtol=0, atol=2e-2)
    # A norm returns on average what the kept components had.
    norm = found.read("model.layers.1.input_layernorm.weight")
    assert bool((norm == norm[0]).all())
    x = units[2 * 1]
    energy = float(((x @ basis) ** 2).sum() / (x**2).sum())
    assert float(norm[0]) == pytest.approx((energy * 64 / 32) ** 0.5, rel=1e-3)


def test_nystroem_keeps_leverage_and_refits_by_least_squares():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, dtype=torch.float64, generator=generator)
    x = torch.randn(200, 24, dtype=torch.float64, generator=generator) @ mixing
    weight = torch.randn(5, 24, dtype=torch.float64, generator=generator)
    gram = x.T @ x / len(x)
    ridge = RIDGE * gram.diagonal().mean()
    expected = (gram @ torch.linalg.inv(gram + ridge * torch.eye(24, dtype=torch.float64))).diagonal()
    torch.testing.assert_close(leverage(gram), expected)
    kept = torch.tensor([1, 4, 5, 9, 12, 20])
    fitted = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(refitted(weight, gram, kept), fitted, rtol=1e-4, atol=1e-4)


def test_v_and_o_lose_no_more_than_the_best_product_of_that_rank():
    generator = torch.Generator().manual_seed(0)
    heads, queries, wide, count = 2, 3, 8, 3
    v = torch.randn(100, heads, wide, dtype=torch.float64, generator=generator)
    weight = torch.randn(10, heads * queries * wide, dtype=torch.float64, generator=generator)
    moments = torch.einsum("thi,thj->hij", v, v) / len(v)
    down, up = directions(moments, weight, count)
    for head in range(heads):
        # What the heads of q add to the outputs, side by side: (tokens, queries · out).
        of_o = weight.reshape(10, heads, queries, wide)[:, head].permute(2, 1, 0).reshape(wide, -1)
        product = v[:, head] @ of_o
        least = torch.linalg.svdvals(product)[count:].square().sum()
        error = (product - v[:, head] @ down[head].T @ up[head].T @ of_o).square().sum()
        assert float(error) == pytest.approx(float(least), rel=1e-6)


@pytest.mark.parametrize(("architecture", "options"), KINDS[:3])
def test_what_is_redundant_goes_without_loss(tiny_tokenizer, tmp_path, architecture, options):
    """Half of the pairs of q and k are 0, v of every head has half of the rank, and three quarters of the channels are 0."""
    source = saved(tiny_tokenizer, tmp_path / "model", architecture, **options)
    model, generator = load_dense(source).model, torch.Generator().manual_seed(3)
    dead = [0, 3, 4, 6]
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear, heads in ((attention.q_proj, 8), (attention.k_proj, 4)):
                for head in range(heads):
                    rows = [16 * head + half + pair for pair in dead for half in (0, 8)]
                    linear.weight[rows] = 0
                    if linear.bias is not None:
                        linear.bias[rows] = 0
            for head in range(4):
                narrow = torch.linalg.qr(torch.randn(16, 8, generator=generator)).Q
                rows = slice(16 * head, 16 * (head + 1))
                attention.v_proj.weight[rows] = narrow @ narrow.T @ attention.v_proj.weight[rows]
                if attention.v_proj.bias is not None:
                    attention.v_proj.bias[rows] = narrow @ narrow.T @ attention.v_proj.bias[rows]
            channels = torch.randperm(128, generator=generator)[32:]
            mlp.up_proj.weight[channels] = 0
            if mlp.up_proj.bias is not None:
                mlp.up_proj.bias[channels] = 0
    model.save_pretrained(tmp_path / "redundant")
    tiny_tokenizer.save_pretrained(tmp_path / "redundant")
    source = open_source(str(tmp_path / "redundant"))
    graph = StructureGraph.of(source)
    keep = graph.parameters({PAIRS: 4, CHANNELS: 32}) / graph.parameters()
    result = pruned(source, tmp_path / "out", "modegpt", keep + 1e-9)
    assert (result.config.head_dim, result.config.intermediate_size) == (8, 32)
    with torch.no_grad():
        expected = model(IDS).logits
    # The statistics are fp32.
    assert float((logits(result) - expected).norm() / expected.norm()) < 1e-3
