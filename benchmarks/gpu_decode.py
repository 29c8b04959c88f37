"""Decoding of whole models of Llama's shapes, random weights: dense bf16 against ours, static cache and CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_checks import prepared
from gpu_session import Absent, Session
from gpu_timing import timed
from random_weights import random_tensors
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from halfplate.evaluation.speed import weight_bytes
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.models.linears import find_linears, replace_module
from halfplate.pattern import Pattern

TWO_OF_FOUR = Pattern(2, 4)
CACHE_LENGTH, PROMPT = 512, 128


def llama_1b(session: Session) -> LlamaConfig:
    """Llama 3.2's 1B."""
    return _llama(session, 2048, 8192, 16, 32, 8, 64, tied=True)


def llama_8b(session: Session) -> LlamaConfig:
    """Llama 3.1's 8B."""
    return _llama(session, 4096, 14336, 32, 32, 8, 128, tied=False)


def _llama(
    session: Session, hidden: int, ffn: int, blocks: int, heads: int, kv_heads: int, head_dim: int, tied: bool
) -> LlamaConfig:
    if session.tiny:
        hidden, ffn, blocks, heads, kv_heads, head_dim = 32, 64, 2, 4, 2, 8
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=session.size(128256, 320),
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def random_llama(config: LlamaConfig, device: torch.device) -> Any:
    """A dense model of `config` in bf16, its weights drawn on `device`."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def decode_models(session: Session) -> None:
    """Seconds of one token after a short prompt, batch 1, and the ratio to the dense model."""
    for size, config in (("1b", llama_1b(session)), ("8b", llama_8b(session))):
        with session.part(f"decode of a {size} shape"):
            _decode_one(session, size, config)


def _decode_one(session: Session, size: str, config: LlamaConfig) -> None:
    model = random_llama(config, session.device)
    dense = _token_seconds(session, model, f"{size} dense bf16")
    for core in ("bf16", "int4"):
        with session.part(f"decode of a {size} shape, 2:4 {core}"):
            if core == "int4":
                raise Absent("no CUDA kernel reads int4 cores yet")
            compress_linears(model, core, session)
            ours = _token_seconds(session, model, f"{size} 2:4 {core}, torch's semi-structured products")
            if not session.tiny:
                session.record.goal(f"model_{size}_{core}", dense / ours)


@torch.no_grad()
def compress_linears(model: Any, core: str, session: Session) -> None:
    """Put a compressed linear of random tensors, prepared for the device, in the place of each linear of the blocks."""
    block = session.size(128, 8)
    made: dict[WeightSpec, dict[str, torch.Tensor]] = {}
    for linear in find_linears(model)[0]:
        spec = WeightSpec(linear.d_out, linear.d_in, TWO_OF_FOUR, core, block, block)
        if spec not in made:
            with session.device:
                made[spec] = random_tensors(spec)
        module = CompressedLinear(spec, False, device="meta")
        module.load_state_dict({name: tensor.clone() for name, tensor in made[spec].items()}, assign=True)
        replace_module(model, linear.name, prepared(session, module.requires_grad_(False)))


def _token_seconds(session: Session, model: Any, name: str) -> float:
    """Seconds of one decoded token, the choice of the next one included."""
    step = decode_step(model, session.size(CACHE_LENGTH, 64), session.size(PROMPT, 16))
    with torch.inference_mode():
        timing = timed([step], session.device, seconds=1.0)
    nbytes = weight_bytes(model).a_token if not session.cuda or name.endswith("dense bf16") else None
    facts: dict[str, Any] = {"graph": timing.graph} | ({} if timing.graph else {"no_graph": timing.why_not})
    if nbytes is not None:
        facts["GB_a_second"] = round(nbytes / timing.seconds / 1e9, 1)
    session.record.measured(f"decode {name}", 1e3 * timing.seconds, "ms a token", **facts)
    return timing.seconds


@torch.inference_mode()
def decode_step(model: Any, length: int, prompt: int) -> Callable[[], None]:
    """A function that decodes one token in place, with transformers' static cache of `length` positions.

    A token goes to the same position every time, whatever was there: a replay costs the same at each.
    """
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(torch.randint(3, 300, (1, prompt), device=device), past_key_values=cache, use_cache=True)
    token = torch.full((1, 1), 5, device=device)
    position = torch.full((1, 1), prompt, device=device)
    # A mask that is made outside keeps the capture free of questions that only the host could answer.
    mask = (torch.arange(length, device=device) <= prompt)[None, None, None]
    counters = [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]

    @torch.inference_mode()
    def step() -> None:
        for counter in counters:
            counter.fill_(prompt)
        logits = model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return step
