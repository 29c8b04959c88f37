"""LoRA through peft's own interface on a compressed model: trained, kept beside, merged into a dense model."""

import pytest
import torch

import halfplate
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear
from halfplate.runtime.backends.cpu import PackedLinear

peft = pytest.importorskip("peft", reason="peft is not installed (pip install '.[peft]')")
from halfplate.adapters import LoraCompressed, adapted  # noqa: E402

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def compressed(tiny_folder_once, tmp_path_factory):
    """The tiny model compressed, codes in its cores for one half, wrappers shared."""
    out = tmp_path_factory.mktemp("adapters") / "compressed"
    halfplate.compress(
        str(tiny_folder_once),
        out,
        method="armor",
        block_size=8,
        samples=4,
        seq_len=32,
        method_options={"iterations": 2},
    )
    return out


@pytest.fixture(params=[False, True], ids=["stored", "packed"])
def base(compressed, request):
    return halfplate.load(compressed, kernels=request.param)


def tokens():
    return torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))


def trained(base, steps=6):
    """`base` with an adapter, after some steps of training on `tokens`; the losses."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, adapted(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def test_training_moves_the_adapter_alone(base):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, losses = trained(base)
    assert losses[-1] < losses[0]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 8
    assert all("lora_" in name for name in trainable)
    assert sum(isinstance(module, LoraCompressed) for module in model.modules()) == 4
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_kept_beside_it_comes_back_the_same(base, compressed, tmp_path):
    model, _ = trained(base)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    config = adapted(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(halfplate.load(compressed), tmp_path / "adapter", config=config)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)
        with again.disable_adapter():
            plain = again(tokens()).logits
        torch.testing.assert_close(plain, halfplate.load(compressed)(tokens()).logits)
    assert not torch.allclose(plain, model(tokens()).logits, atol=1e-2)


def test_generation_takes_the_adapter_into_account(base):
    model, _ = trained(base)
    prompt = tokens()[:1, :8]
    written = model.generate(input_ids=prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    with torch.no_grad():
        for length in range(8, 20):
            assert written[0, length] == model(written[:, :length]).logits[0, -1].argmax()


def test_merged_into_a_dense_model(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = trained(base)
    with torch.no_grad():
        expected = model(tokens()).logits
    dense = model.merge_and_unload().dequantize(torch.float32)
    assert not any(isinstance(module, CompressedLinear | PackedLinear) for module in dense.modules())
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_what_needs_dense_weights_is_refused(base):
    with pytest.raises(HalfplateError, match="use_dora=True"):
        adapted(peft.LoraConfig(use_dora=True))
    with pytest.raises(HalfplateError, match="init_lora_weights='pissa'"):
        adapted(peft.LoraConfig(init_lora_weights="pissa"))
    model, _ = trained(base, steps=1)
    with pytest.raises(HalfplateError, match="merge_and_unload"):
        model.merge_adapter()


def test_biases_of_the_adapter_are_merged(base):
    options = {"r": 4, "target_modules": TARGETS, "lora_bias": True, "fan_in_fan_out": True}
    model = peft.get_peft_model(base, adapted(peft.LoraConfig(**options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = model(tokens()).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_merging_in_bf16_ends_in_one_type_and_half_a_merge_is_not_saved(compressed, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16)
    model, _ = trained(loaded, steps=2)
    merged = model.merge_and_unload()
    with pytest.raises(HalfplateError, match="no longer a compressed matrix"):
        merged.save_pretrained(tmp_path / "half")
    dense = merged.dequantize()
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    assert torch.isfinite(dense(tokens()).logits).all()


def test_what_trains_the_base_needs_it_unpacked(compressed):
    for option in ({"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [3]}):
        config = adapted(peft.LoraConfig(r=4, target_modules=TARGETS, **option))
        with pytest.raises(HalfplateError, match="load it with kernels=False"):
            peft.get_peft_model(halfplate.load(compressed), config)
    config = adapted(peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]))
    model = peft.get_peft_model(halfplate.load(compressed, kernels=False), config)
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_variant_that_comes_with_a_second_adapter_is_refused(base):
    model = peft.get_peft_model(base, adapted(peft.LoraConfig(r=4, target_modules=TARGETS)))
    with pytest.raises(HalfplateError, match="DoraLinearVariant of peft is not supported"):
        model.add_adapter("second", peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True))


@pytest.mark.slow
def test_the_alternative_trains_wrappers(compressed, tiny_folder_once, tmp_path):
    """`recover --train wrappers`: nothing beside, the same file format, cores as they were."""
    halfplate.recover(
        str(compressed),
        str(tiny_folder_once),
        str(tmp_path / "tuned"),
        train="wrappers",
        tokens=2048,
        samples=64,
        seq_len=32,
    )
    before, after = (halfplate.load(path, kernels=False) for path in (compressed, tmp_path / "tuned"))
    changed = [
        name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])
    ]
    assert any(name.endswith("_blocks") for name in changed)
    assert not any(name.endswith((".weight_index", "_proj.weight")) for name in changed)
