"""Rounds, ratios, bytes and memory, on a clock that stands still unless told otherwise."""

import mmap
from statistics import median

import pytest
import torch
from torch import nn

from halfplate.errors import HalfplateError
from halfplate.evaluation import bench, speed
from halfplate.evaluation.bench import cast_copy, greedy_contender, packed_dense, time_rounds, transformers_contender
from halfplate.evaluation.speed import PeakMemory, Speed, WeightBytes, alternate, paired_ratio, time_generation
from halfplate.runtime import accelerate, greedy


class Clock:
    """Seconds that pass only by `sleep`."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_prefill_and_decode_are_timed_apart():
    clock = Clock()

    def contender(ids, new_tokens, first):
        clock.sleep(0.5)
        first()
        for _ in range(new_tokens - 1):
            clock.sleep(0.1)

    found = time_generation(contender, torch.zeros(1, 40, dtype=torch.int64), 11, clock)
    assert found.prefill == pytest.approx(40 / 0.5)
    assert found.decode == pytest.approx(10)


def test_rounds_alternate_and_each_starts_with_another():
    order, told = [], []
    tasks = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    results = alternate(tasks, 4, lambda done, total: told.append((done, total)))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert told == [(done, 12) for done in range(1, 13)]


def test_paired_ratios_do_not_see_what_slows_a_whole_round():
    slowdown = [1, 7, 2, 30, 1]
    theirs = [10 / s for s in slowdown]
    ours = [25 / s for s in slowdown]
    assert paired_ratio(ours, theirs) == pytest.approx(2.5)
    assert paired_ratio([3, 1, 8], [1, 1, 2]) == 3


def test_prompts_are_seeded():
    ids = speed.random_prompt(50, 9)
    assert ids.shape == (1, 9)
    assert int(ids.max()) < 50
    assert torch.equal(ids, speed.random_prompt(50, 9))
    assert not torch.equal(ids, speed.random_prompt(50, 9, seed=1))


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes(tiny_model, tied):
    model = tiny_model(tie_word_embeddings=tied)
    found = speed.weight_bytes(model)
    table = model.get_input_embeddings().weight.nbytes
    linears = sum(m.weight.nbytes for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert found.linears == linears
    # Norms, the table of the rotary embedding, and the head where it is the embedding too.
    small = sum(p.nbytes for p in model.parameters() if p.ndim == 1) + sum(b.nbytes for b in model.buffers())
    assert found.total == linears + table * (1 if tied else 2) + small
    row = model.config.hidden_size * 4
    assert found.a_token == (found.total if tied else found.total - table + row)


def test_sliced_tensors_count_their_memory_once(tiny_model):
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    before = speed.weight_bytes(model)
    both = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    size = attention.k_proj.weight.shape[0]
    attention.k_proj.weight = nn.Parameter(both[:size], requires_grad=False)
    attention.v_proj.weight = nn.Parameter(both[size:], requires_grad=False)
    assert speed.weight_bytes(model) == before


def test_cast_copies_keep_ties_and_buffers(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    cast = cast_copy(model, torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in cast.buffers()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert cast.lm_head.weight is cast.model.embed_tokens.weight
    assert torch.equal(cast.model.norm.weight, model.model.norm.weight.bfloat16())
    ids = speed.random_prompt(128, 5)
    assert torch.allclose(cast(ids).logits.float(), model(ids).logits, atol=0.5)


def test_generate_writes_exactly_what_is_asked_for(tiny_model):
    model = tiny_model()
    # A model that ends at once: the end of text is by far the most likely token.
    model.lm_head.weight.zero_()
    model.lm_head.bias = nn.Parameter(torch.zeros(128), requires_grad=False)
    model.lm_head.bias[2] = 50
    calls = []
    with torch.inference_mode():
        transformers_contender(model)(speed.random_prompt(128, 6), 9, lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize("accelerated", [True, False])
def test_our_loop_writes_exactly_what_is_asked_for(tiny_model, accelerated):
    model = tiny_model()
    if accelerated:
        accelerate(model)
    calls, told = [], []
    ids = speed.random_prompt(128, 6)
    greedy_contender(model)(ids, 9, lambda: calls.append(1))
    assert calls == [1]
    tokens = greedy(model, ids, 5, on_token=told.append)
    assert tokens[0, 6:].tolist() == told


def test_packed_dense_shares_all_but_its_linears(tiny_model):
    model = tiny_model()
    before = model(speed.random_prompt(128, 6)).logits
    packed = packed_dense(model)
    assert packed.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, nn.Linear)
    assert torch.equal(model(speed.random_prompt(128, 6)).logits, before)
    assert torch.allclose(packed(speed.random_prompt(128, 6)).logits, before, atol=0.5)
    half = sum(m.weight.numel() * 2 for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert half < speed.weight_bytes(packed).linears < 2.5 * half  # rows of 32 and 48 are padded


def test_rounds_of_real_models(tiny_model):
    model = tiny_model()
    entry = bench.Entry(transformers_contender(model), speed.weight_bytes(model))
    with torch.inference_mode():
        rounds = time_rounds({"one": entry, "two": entry}, speed.random_prompt(128, 6), 4, 3)
    assert [len(rounds.speeds[name]) for name in ("one", "two")] == [3, 3]
    figures = rounds.figures("one", entry)
    assert figures["decode_tokens_per_s"] == median(rounds.decode("one"))
    assert figures["gb_per_s"] == pytest.approx(entry.weights.a_token * figures["decode_tokens_per_s"] / 1e9)
    assert figures["peak_rss_bytes"] is None


def fake_entries(**rates):
    """Entries and rounds with the decode and prefill rates given for each contender."""
    names = {name.replace("__", " "): value for name, value in rates.items()}
    entries = {name: bench.Entry(lambda *_: None, WeightBytes(100, 50, 80), 7) for name in names}
    speeds = {name: [Speed(prefill, decode)] * 3 for name, (decode, prefill) in names.items()}
    return entries, bench.Rounds(speeds, [1600.0] * 3)


def test_comparison_takes_dense_at_its_best():
    entries, rounds = fake_entries(halfplate=(12, 90), dense__fp32=(3, 60), dense__bf16=(4, 30))
    ours = {"halfplate": entries.pop("halfplate")}
    result = bench._compared(ours, entries, rounds)
    assert result["decode_speedup"] == 3
    assert result["prefill_speedup"] == 1.5
    assert (result["dense"]["dtype"], result["dense"]["prefill_dtype"]) == ("bf16", "fp32")
    assert (result["dense"]["decode_tokens_per_s"], result["dense"]["prefill_tokens_per_s"]) == (4, 60)
    assert result["dense"]["dtypes"]["fp32"]["decode_tokens_per_s"] == 3
    assert (result["weight_bytes"], result["linear_bytes"], result["peak_rss_bytes"]) == (100, 50, 7)
    assert result["read_share"] == pytest.approx(80 * 12 / 1600)
    assert "loops" not in result


def test_comparison_of_loops_tells_what_the_weights_give():
    entries, rounds = fake_entries(
        halfplate=(12, 90), generate=(9, 90), dense__fp32=(3, 60), dense__bf16=(4, 30), dense_same_loop=(6, 31)
    )
    ours = {name: entries.pop(name) for name in ("halfplate", "generate")}
    result = bench._compared(ours, entries, rounds)
    assert result["weights_speedup"] == 2
    assert result["decode_speedup"] == 3
    assert result["loops"]["generate"]["decode_speedup"] == pytest.approx(9 / 4)
    assert result["loops"]["dense_same_loop"]["decode_speedup"] == 1.5
    assert result["dense"]["dtypes"].keys() == {"fp32", "bf16"}


def test_comparison_without_dense():
    entries, rounds = fake_entries(halfplate=(12, 90))
    result = bench._compared(entries, {}, rounds)
    assert (result["decode_tokens_per_s"], result["prefill_tokens_per_s"]) == (12, 90)
    assert result.keys().isdisjoint({"dense", "decode_speedup", "loops", "weights_speedup"})


def test_peak_memory_is_that_of_what_was_loaded_since():
    memory = PeakMemory()
    if memory.take() is None:
        pytest.skip("this system does not tell the memory of a process")

    def fresh(nbytes):
        # Not from the allocator, which may hold free memory that is resident already.
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).fill_(1)

    memory.start()
    held = fresh(64 * 2**20)
    first = memory.take()
    memory.start()
    more = fresh(16 * 2**20)
    second = memory.take()
    assert held.nbytes * 0.9 < first - second + more.nbytes < held.nbytes * 1.3
    assert second < first


def test_probe_reads_memory(monkeypatch):
    monkeypatch.setattr(speed, "PROBE_BYTES", 2**22)
    assert speed.read_probe(1)() > 0


def test_bench_refuses(tiny_folder):
    for options, parts in (
        ({"prompt": 0}, "prompt=0"),
        ({"new_tokens": 1}, "new_tokens=1"),
        ({"rounds": 0}, "rounds=0"),
        ({"activations": "int4"}, "activations='int4'"),
        ({"head_dtype": "int4"}, "head_dtype='int4'"),
        ({"activations": "int8"}, "activations='int8' is for Halfplate checkpoints"),
        ({"loops": True}, "loops=True is for Halfplate checkpoints"),
        ({"prompt": 100, "new_tokens": 100}, "128 positions"),
    ):
        with pytest.raises(HalfplateError, match=parts):
            bench.bench(str(tiny_folder), **options)


def test_bench_leaves_the_threads_as_they_were(tiny_folder, monkeypatch):
    monkeypatch.setattr(speed, "PROBE_BYTES", 2**20)
    result = bench.bench(str(tiny_folder), prompt=4, new_tokens=3, threads=2, rounds=1)
    assert result["threads"] == 2
    assert torch.get_num_threads() == 1
