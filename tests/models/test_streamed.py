"""A model whose blocks come into memory one at a time computes what the whole model does, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfplate.errors import HalfplateError
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.sources import load_dense, open_source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms.conversion import needs_conversion

ARCHITECTURES = ("llama", "qwen2", "mistral", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "opt", "falcon")
IDS = torch.arange(3, 27).reshape(2, 12)


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(str(folder))


class Doubled(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = [linear]  # no module of the model

    def forward(self, x):
        return 2 * self.linear[0](x)


def nothing_loaded(streamed):
    return all(parameter.is_meta for parameter in streamed.model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_block_by_block_and_as_a_whole(tiny_model, tiny_tokenizer, tmp_path, architecture):
    source = saved(tiny_model(architecture), tiny_tokenizer, tmp_path / "model")
    assert not needs_conversion(source)
    dense, streamed = load_dense(source).model, StreamedModel(source)
    with streamed.outer(head=False):
        inputs = streamed.embed(IDS)
    expected = BlockwiseModel(dense).embed(IDS)
    for index in range(len(streamed.blocks)):
        streamed.load_block(index)
        inputs = streamed.blockwise.run_block(index, inputs)
        streamed.free_block(index)
        expected = BlockwiseModel(dense).run_block(index, expected)
    assert torch.equal(inputs.hidden, expected.hidden)
    logits = dense(IDS, use_cache=False).logits
    for held in (False, True):
        with streamed.running(held) as model:
            assert torch.equal(model(IDS, use_cache=False).logits, logits)
            assert torch.equal(model(IDS, use_cache=False).logits, logits)
        assert nothing_loaded(streamed)
    with streamed.running(True, Doubled) as model:
        assert not torch.equal(model(IDS, use_cache=False).logits, logits)
        assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert nothing_loaded(streamed)
    with streamed.running(True) as model:
        assert torch.equal(model(IDS, use_cache=False).logits, logits)
    assert streamed.model.generation_config.to_dict() == dense.generation_config.to_dict()


def test_only_one_block_is_in_memory(tiny_model, tiny_tokenizer, tmp_path):
    streamed = StreamedModel(saved(tiny_model("llama", num_hidden_layers=3), tiny_tokenizer, tmp_path / "model"))
    seen = []
    with streamed.running(held=False) as model, torch.no_grad():
        for block in streamed.blocks:
            block.register_forward_hook(
                lambda *_: seen.append([not next(b.parameters()).is_meta for b in streamed.blocks]), prepend=True
            )
        model(IDS)
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]


def test_damage_is_named(tiny_folder):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path, {"format": "pt"})
    with pytest.raises(HalfplateError, match=rf"{name} holds 1536 NaN"):
        StreamedModel(open_source(str(tiny_folder))).load_block(1)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(HalfplateError, match=rf"lack 1 tensors .*{name}"):
        StreamedModel(open_source(str(tiny_folder)))
    save_file(tensors | {name: tensors[name][:5].clone()}, path, {"format": "pt"})
    with pytest.raises(HalfplateError, match=rf"{name} has shape \(5, 32\)"):
        StreamedModel(open_source(str(tiny_folder)))
    save_file(tensors | {name: tensors[name].to(torch.int16)}, path, {"format": "pt"})
    with pytest.raises(HalfplateError, match=rf"{name} is stored as I16, expected F32, BF16 or F16"):
        StreamedModel(open_source(str(tiny_folder)))
