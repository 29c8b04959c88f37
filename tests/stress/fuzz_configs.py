"""Configurations of many architectures with entries changed, beside tiny weights: what `plan` makes of them.

Used by `tests/stress/fuzz.py` (reader `config`) and, with a few inputs, by the tests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfplate.errors import HalfplateError
from halfplate.planning import make_plan
from halfplate.recipe import Recipe

LONGEST = 60  # seconds that one input may take before it counts as a hang
RECIPE = Recipe(samples=4, seq_len=16)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
PLAIN = (
    "llama mistral qwen2 qwen3 gemma olmo olmo2 olmo3 cohere cohere2 phi3 glm glm4 granite smollm3 starcoder2 stablelm arcee helium"
    " nemotron exaone4 seed_oss apertus ernie4_5 hunyuan_v1_dense ministral diffllama doge biogpt opt persimmon"
)
# What differs from SIZES; None: not given.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in PLAIN.split()},
    "falcon": {"head_dim": None},
    "phi": {"num_key_value_heads": 4},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": {"state_size": 4},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "qwen2_moe": EXPERTS | {"num_experts": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "olmoe": EXPERTS | {"num_experts": 4},
    "phimoe": EXPERTS | {"num_local_experts": 4},
    "granitemoe": EXPERTS | {"num_local_experts": 4},
    "gpt_oss": EXPERTS | {"num_local_experts": 4},
    "jamba": EXPERTS | {"num_experts": 4, "mamba_d_state": 4, "use_mamba_kernels": False},
    "gemma4_text": {},
}
NUMBERS = (0, 1, -1, 2, 3, 7, 63, 65, 127, 2**15, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, -(2**63), 10**30)
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "foo", "7", "flash_attention_2", "Traceback", "ü\n\x00"),
    *(
        0.0,
        -1.5,
        1e-30,
        1e300,
        float("nan"),
        float("inf"),
        [],
        [1],
        ["full_attention"],
        [None, None],
        {},
        {"a": 1},
        [[[[1]]]],
        {"a": {"b": [{}]}},
    ),
)
LEFTOVERS: tuple[dict[str, Any], ...] = (
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    {"quantization_config": {"quant_method": ["x"]}},
    {"quantization_config": 7},
    {"compression_config": {"format": "pack"}},
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation": {"": "flash_attention_3"}},
    {"attn_implementation": ["sdpa"]},
    {"experts_implementation": "triton"},
    {"output_attentions": True},
    {"output_hidden_states": "yes"},
    {"return_dict": False},
    {"torchscript": True},
    {"dtype": "float17"},
    {"torch_dtype": "auto"},
    {"dtype": {"": "bfloat16"}},
    {"pad_token_id": 10**6},
    {"pad_token_id": -1},
    {"eos_token_id": [1, "a", None]},
    {"rope_scaling": {"type": "su", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn"}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": "a", "long_factor": [1]}},
    {"rope_parameters": {"rope_type": "llama3", "factor": None}},
    {"rope_parameters": {"full_attention": 3}},
    {"auto_map": {"AutoConfig": "a.B"}},
    {"auto_map": 3},
    {"architectures": None},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": [None]},
    {"text_config": {}},
    {"is_encoder_decoder": True},
    {"is_decoder": False},
    {"add_cross_attention": True},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": "no"},
    {"layer_types": ["full_attention"] * 3},
    {"layer_types": ["foo", "bar"]},
    {"num_nextn_predict_layers": 2**40},
    {"pruned_heads": {"0": [1]}},
    {"model_type": 7},
    {"model_type": "bert"},
    {"id2label": {"a": "b"}},
    {"num_labels": -3},
    {"problem_type": 5},
    {"per_layer_config": {"0": 3}},
    {"to_dict": 3},
    {"save_pretrained": None},
    {"get_text_config": "x"},
    {"attribute_map": {"hidden_size": "vocab_size"}},
)


class Hang(BaseException):
    """An input that takes too long; no Exception, so that no reader takes it for a failure of its own."""


def write_model(kind: str, folder: Path) -> None:
    """A tiny model of the architecture `kind` with weights of zeros, without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in (SIZES | ARCHITECTURES[kind]).items() if value is not None}
    config = AutoConfig.for_model(kind, **sizes)
    config.architectures = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    tied = model.all_tied_weights_keys
    weights = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')


def changed(entries: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """`entries` with one to three of them missing, of another type, too large, negative, unknown, or added."""
    entries = deepcopy(entries)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place: dict[str, Any] = entries
        inner = [value for value in entries.values() if isinstance(value, dict) and value]
        if inner and chance.random() < 0.3:
            place = chance.choice(inner)
        if chance.random() < 0.3:
            entries |= deepcopy(chance.choice(LEFTOVERS))
            continue
        key = chance.choice(list(place))
        # Another type of model is another kind of test.
        if key == "model_type" and chance.random() < 0.8:
            continue
        value, kind = place[key], chance.randrange(4)
        if kind == 0:
            del place[key]
            if not entries:
                return entries
        elif kind == 1 or isinstance(value, int | float):
            place[key] = chance.choice(NUMBERS)
        else:
            place[key] = deepcopy(chance.choice(VALUES))
    return entries


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def overheard() -> Iterator[Callable[[], str]]:
    """While inside, what the process and its libraries write to standard output and error goes to a file; yields what reads the news."""
    with tempfile.TemporaryFile() as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        own = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        read = 0

        def news() -> str:
            nonlocal read
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            end = os.lseek(file.fileno(), 0, os.SEEK_END)
            text = os.pread(file.fileno(), end - read, read)
            read = end
            return text.decode(errors="replace")

        try:
            yield news
        finally:
            for number, saved in zip((1, 2), own, strict=True):
                os.dup2(saved, number)
                os.close(saved)


def fuzz_configs(inputs: int, chance: random.Random, scratch: Path, keep: Path, kinds: tuple[str, ...]) -> Counter[str]:
    """Plan `inputs` changed configurations, of `kinds` in turn; how many were taken, refused, crashed, hung or spoke of a traceback."""
    counts: Counter[str] = Counter(inputs=inputs, architectures=len(kinds))
    whole: dict[str, dict[str, Any]] = {}
    with overheard() as news:
        for number in range(inputs):
            kind = kinds[number % len(kinds)]
            folder = scratch / kind
            if kind not in whole:
                write_model(kind, folder)
                whole[kind] = json.loads((folder / "config.json").read_text())
                # The architecture as such must be taken, or said why it is not.
                counts[_outcome(folder, keep / f"{kind}-unchanged", news)[0] + " unchanged"] += 1
            (folder / "config.json").write_text(json.dumps(changed(whole[kind], chance)))
            outcome, lines = _outcome(folder, keep / f"config-{number}", news)
            counts[outcome] += 1
            counts["of several lines"] += lines > 1
    return counts


def _outcome(folder: Path, keep: Path, news: Callable[[], str]) -> tuple[str, int]:
    """What becomes of the model in `folder`, and the lines of a refusal."""
    started, told, lines = time.monotonic(), "", 0
    try:
        with alarm(LONGEST):
            json.dumps(make_plan(str(folder), RECIPE).to_json())
        outcome = "taken"
    except HalfplateError as refusal:
        outcome, told, lines = "refused", str(refusal), str(refusal).count("\n") + 1
    except Hang:
        outcome, told = "hangs", traceback.format_exc()
    except Exception:
        outcome, told = "crashes", traceback.format_exc()
    heard = news()
    if "Traceback (most recent call last)" in heard:
        outcome, told = "tracebacks", heard
    if outcome in ("crashes", "hangs", "tracebacks"):
        keep.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "config.json", keep)
        (keep / "why.txt").write_text(f"{folder.name} after {time.monotonic() - started:.1f} s\n{told}")
    return outcome, lines
