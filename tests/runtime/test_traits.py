"""The native step of random combinations of traits against a decoder in plain torch."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from halfplate.kernels import native
from halfplate.runtime.architectures import AROUND, BEHIND, EACH_HEAD, Architecture, Routing
from halfplate.runtime.backends.cpu import PackedLinear
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.native_step import NativeDecoder
from trait_model import FUNCTIONS, TraitModel

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")

LENGTH, VOCABULARY = 7, 40
BEFORE = Architecture().norms
SHARED = ("shared.gate_proj", "shared.up_proj", "shared.down_proj")


@some.composite
def architectures(draw):
    """Any architecture whose traits do not contradict each other."""
    norm = draw(some.sampled_from(("rms", "rms+1", "mean", "mean+1")))
    parallel, gated = draw(some.booleans()), draw(some.booleans())
    whole = norm.startswith("rms") and draw(some.booleans())
    mixture = draw(some.booleans())
    clamped = gated and mixture and draw(some.booleans())
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    names = ("gate_up_proj", "down_proj") if gated and draw(some.booleans()) else names
    shared = mixture and draw(some.booleans())
    routing = Routing(
        normalised=draw(some.booleans()),
        shared=(SHARED if gated else SHARED[1:]) if shared else (),
        shared_gate="shared.weigh" if shared and draw(some.booleans()) else None,
    )
    return Architecture(
        norms=("input_layernorm", None, None, None) if parallel else draw(some.sampled_from((BEFORE, AROUND, BEHIND))),
        norm=norm,
        head_norms=EACH_HEAD if draw(some.booleans()) else None,
        whole_norms=whole,
        late_norms=not whole and draw(some.booleans()),
        qkv=draw(some.sampled_from((Architecture().qkv, ("self_attn.qkv_proj",)))),
        mlp=tuple(f"mlp.{name}" for name in names),
        gated=gated,
        clamped=clamped,
        parallel=parallel,
        windows=draw(some.sampled_from(("none", "all", "by layer"))),
        rotation=draw(some.sampled_from(("halves", "pairs"))),
        rotated=lambda attention: attention.rotated,
        sinks="self_attn.sinks" if draw(some.booleans()) else None,
        embedding_scale="embedding_scale",
        residual_scale="residual_scale",
        logit_scale="logit_scale",
        logit_divisor="logit_divisor",
        attention_cap="attention_cap",
        logit_cap="logit_cap",
        mixture=routing if mixture else None,
    )


@some.composite
def models(draw):
    """A model of random sizes for one of them."""
    architecture = draw(architectures())
    kv_heads, experts = draw(some.integers(1, 2)), draw(some.integers(1, 6))
    head_dim = draw(some.sampled_from((4, 6, 16, 20)))
    kinds = some.sampled_from(("sliding_attention", "full_attention"))
    sizes = {
        "vocabulary": VOCABULARY,
        "hidden": draw(some.sampled_from((12, 32))),
        "heads": kv_heads * draw(some.integers(1, 5)),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "pairs": draw(some.integers(1, head_dim // 2)),
        "intermediate": draw(some.sampled_from((5, 16, 24))),
        "layer_types": draw(some.lists(kinds, min_size=2, max_size=2)),
        "window": draw(some.integers(1, LENGTH + 1)),
        "scaling": 0.4,
        "still": draw(some.integers(0, 3)),
        "ordinary": draw(some.integers(0, 3)),
        "experts": experts,
        "chosen": draw(some.integers(1, experts)),
        "bias": draw(some.booleans()),
    }
    scale = some.sampled_from((1.0, 0.5, 3.0))
    entries = {name: draw(scale) for name in ("embedding_scale", "residual_scale", "logit_scale", "logit_divisor")}
    entries |= {name: draw(some.sampled_from((None, 0.7, 20.0))) for name in ("attention_cap", "logit_cap")}
    torch.manual_seed(draw(some.integers(0, 1000)))
    return TraitModel(architecture, sizes, entries | {"hidden_act": draw(some.sampled_from(sorted(FUNCTIONS)))})


def decoder_of(model):
    with mock.patch("halfplate.runtime.native_step.architecture_of", return_value=model.architecture):
        return NativeDecoder(model.float(), PackedLinear.of_dense)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * (1 + float(expected.abs().max())))


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(models(), some.integers(1, 20), some.integers(2, LENGTH))
def test_steps_of_any_traits_give_the_logits_of_plain_torch(model, count, at_once):
    torch.set_num_threads(1)
    decoder, traits = decoder_of(model), model.sizes
    ids, first = torch.randint(0, VOCABULARY, (count, LENGTH)), torch.randint(0, LENGTH - 1, (count,))
    first[0] = 0
    room = (len(traits["layer_types"]), traits["kv_heads"], LENGTH, traits["head_dim"])
    cache = GrowingCache.with_room(room[0], 1, *room[1:])
    alone = torch.stack([decoder.step(int(token), cache) for token in ids[0]])
    cache = GrowingCache.with_room(room[0], count, *room[1:])
    steps = []
    for slot in range(LENGTH):
        padding = first.clamp_max(slot)
        steps.append(decoder.step_batch(ids[:, slot].contiguous(), cache, slot - padding, padding))
    cache, chunks = GrowingCache.with_room(room[0], count, *room[1:]), []
    for slot in range(0, LENGTH, at_once):
        part = ids[:, slot : slot + at_once]
        places = (torch.arange(slot, slot + part.shape[1]) - first[:, None]).clamp_min(0)
        chunks.append(decoder.step_rows(part, cache, places, first.clamp_max(slot + part.shape[1] - 1)))
    expected = model.logits(ids, first)
    assert expected.isfinite().all()
    close(alone, expected[0])
    text = torch.arange(LENGTH) >= first[:, None]
    close(torch.stack(steps, 1)[text], expected[text])
    close(torch.cat(chunks, 1)[text], expected[text])
