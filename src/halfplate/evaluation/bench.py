"""The speed of a model compared with its original model, in one process."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfplate.arguments import path_text, typed
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.evaluation import speed
from halfplate.evaluation.speed import Contender, PeakMemory, Speed, WeightBytes
from halfplate.limits import cores, use_threads
from halfplate.models.context import positions
from halfplate.models.sources import is_compressed, load_dense
from halfplate.telemetry.machine import load_average, machine
from halfplate.telemetry.progress import Report, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


COMPRESSED = "halfplate"
GENERATE = "generate"
SAME_LOOP = "dense_same_loop"
# Decoding one token makes a contender allocate and compile everything that it needs.
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Entry:
    """A contender that is loaded and warmed up. peak: peak memory in bytes while loading and running it, None if unknown."""

    contender: Contender
    weights: WeightBytes
    peak: int | None = None


@dataclass(frozen=True)
class Rounds:
    """Speeds of every contender by round, and the memory read bandwidth in bytes per second in that round."""

    speeds: Mapping[str, list[Speed]]
    bandwidth: list[float]

    def decode(self, name: str) -> list[float]:
        return [one.decode for one in self.speeds[name]]

    def prefill(self, name: str) -> list[float]:
        return [one.prefill for one in self.speeds[name]]

    def figures(self, name: str, entry: Entry) -> dict[str, Any]:
        """The JSON object of one contender: medians over rounds, and its bytes."""
        read = [entry.weights.a_token * rate for rate in self.decode(name)]
        return {
            "decode_tokens_per_s": median(self.decode(name)),
            "prefill_tokens_per_s": median(self.prefill(name)),
            "weight_bytes": entry.weights.total,
            "linear_bytes": entry.weights.linears,
            "bytes_per_token": entry.weights.a_token,
            "peak_rss_bytes": entry.peak,
            "gb_per_s": median(read) / 1e9,
            "read_share": speed.paired_ratio(read, self.bandwidth),
        }


@plain_defaults()
def bench(
    model: str | Path,
    against: str | Path | None = None,
    prompt: int = 128,
    new_tokens: int = 64,
    threads: int | None = None,
    activations: str = "auto",
    head_dtype: str | None = None,
    rounds: int = 5,
    loops: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Time reading `prompt` tokens and generating `new_tokens` tokens, in rounds that alternate with the original model.

    - model: a checkpoint, or an original model
    - against: the original model, timed in fp32 and bf16 by transformers' `generate`; ratios are to the faster one
    - activations, head_dtype: as in `halfplate.load`, for a checkpoint
    - loops: also time the checkpoint by `generate`, and the original weights, packed in bf16, in the decoder of the checkpoint
    - progress: called with the phase, the steps done and all steps

    Returns the object of `halfplate bench --json` (docs/speed.md), with medians over `rounds`.
    Raises HalfplateError for invalid numbers and for models that cannot be read.
    """
    from halfplate.runtime.prepare import check_options

    model, against = path_text("model", model), None if against is None else path_text("against", against)
    check_options(activations, head_dtype)
    _check(model, prompt, new_tokens, rounds, activations, loops)
    report = progress or silent
    with _threads(threads), torch.inference_mode():
        # Read before the work of this process increases the load.
        where, load = machine(), load_average()
        bringing_in = _BringingIn(prompt, new_tokens, report)
        if is_compressed(model):
            subject = bringing_in.compressed(model, activations, head_dtype, loops)
        else:
            subject = bringing_in.dense(model, "")
        dense = bringing_in.dense(against, "dense ", loops, head_dtype) if against else {}
        result = time_rounds(subject | dense, bringing_in.ids, new_tokens, rounds, report)
        return {
            "model": model,
            "against": against,
            "prompt": prompt,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "activations": activations,
            "head_dtype": head_dtype,
            "machine": where,
            "cores": cores(),
            "load_average": load,
            "paths": bringing_in.paths,
            "read_gb_per_s": median(result.bandwidth) / 1e9,
            **_compared(subject, dense, result),
        }


def time_rounds(
    entries: Mapping[str, Entry], ids: Tensor, new_tokens: int, rounds: int, progress: Report | None = None
) -> Rounds:
    """Time all `entries` and the memory bandwidth of the machine in alternating rounds; ids int64 (1, L)."""
    report = progress or silent
    read = speed.read_probe(torch.get_num_threads())
    tasks: dict[str, Callable[[], Any]] = {
        name: lambda entry=entry: speed.time_generation(entry.contender, ids, new_tokens)  # type: ignore[misc]
        for name, entry in entries.items()
    }
    timed = speed.alternate(tasks | {"read": read}, rounds, lambda done, total: report("timing", done, total))
    bandwidth = timed.pop("read")
    return Rounds(timed, bandwidth)


def transformers_contender(model: "PreTrainedModel") -> Contender:
    """Greedy `generate` of transformers with its cache, for exactly the requested number of tokens."""
    from transformers.generation.streamers import BaseStreamer

    class FirstToken(BaseStreamer):
        """Calls a function when the first new token is known: the second item that `generate` emits, after the prompt."""

        def __init__(self, first: Callable[[], None]) -> None:
            self.first, self.puts = first, 0

        def put(self, value: Tensor) -> None:
            self.puts += 1
            if self.puts == 2:
                self.first()

        def end(self) -> None:
            pass

    settings = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "pad_token_id": 0}

    def run(ids: Tensor, new_tokens: int, first: Callable[[], None]) -> None:
        exactly = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        generate: Any = model.generate
        tokens = generate(ids, attention_mask=torch.ones_like(ids), streamer=FirstToken(first), **exactly, **settings)
        assert tokens.shape[1] == ids.shape[1] + new_tokens

    return run


def greedy_contender(model: "PreTrainedModel") -> Contender:
    """Halfplate's own loop over an accelerated model."""
    from halfplate.runtime import greedy

    def run(ids: Tensor, new_tokens: int, first: Callable[[], None]) -> None:
        told: list[int] = []

        def on_token(token: int) -> None:
            if not told:
                first()
            told.append(token)

        greedy(model, ids, new_tokens, on_token=on_token)
        assert len(told) == new_tokens

    return run


def cast_copy(model: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A copy of `model` with parameters in `dtype` and unchanged buffers, as transformers loads them."""
    cast = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()}
    # deepcopy uses these instead of copying, so tied parameters stay tied and no fp32 copy is made.
    return copy.deepcopy(model, cast)  # type: ignore[arg-type]


def packed_dense(model: "PreTrainedModel", head_dtype: str | None = None) -> "PreTrainedModel":
    """A copy of the original fp32 `model` with its linears in kernel layout in bf16, for Halfplate's loop."""
    from halfplate.runtime import accelerate

    # The copy shares every tensor. Packing replaces its linears and does not change the tensors.
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    packed = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    accelerate(packed, head_dtype=head_dtype or "bf16", dense_dtype="bf16")
    return packed


def enter(contender: Contender, model: nn.Module, ids: Tensor, memory: PeakMemory) -> Entry:
    """Warm up a contender; `memory` was started before its model was loaded."""
    contender(ids, WARM_UP_TOKENS, lambda: None)
    return Entry(contender, speed.weight_bytes(model), memory.take())


class _BringingIn:
    """Loads models one after the other, runs each once, and keeps a prompt that is valid for all."""

    def __init__(self, prompt: int, new_tokens: int, report: Report) -> None:
        self._prompt, self._new_tokens, self._report = prompt, new_tokens, report
        self._memory = PeakMemory()
        self._name = ""
        self.paths: list[str] = []  # the kernel of each linear of the checkpoint, and how it decodes
        self.ids = torch.empty(1, 0, dtype=torch.int64, device="cpu")

    def compressed(self, name: str, activations: str, head_dtype: str | None, loops: bool) -> dict[str, Entry]:
        from halfplate.checkpoint.read import load
        from halfplate.runtime import explain

        self._start(name)
        model = load(name, activations=activations, head_dtype=head_dtype)
        self._fit(name, model)
        self.paths = str(explain(model)).splitlines()
        entries = {COMPRESSED: enter(greedy_contender(model), model, self.ids, self._memory)}
        if loops:
            entries[GENERATE] = enter(transformers_contender(model), model, self.ids, self._memory)
        self._report(f"reading {name}", 1, 1)
        return entries

    def dense(self, name: str, prefix: str, same_loop: bool = False, head_dtype: str | None = None) -> dict[str, Entry]:
        """The model in fp32 and in bf16, and with `same_loop` also packed in bf16 for Halfplate's loop."""
        self._start(name)
        full = load_dense(name).model
        self._fit(name, full)
        entries = {f"{prefix}fp32": enter(transformers_contender(full), full, self.ids, self._memory)}
        self._memory.start()
        half = cast_copy(full, torch.bfloat16)
        entries[f"{prefix}bf16"] = enter(transformers_contender(half), half, self.ids, self._memory)
        if same_loop:
            self._memory.start()
            packed = packed_dense(full, head_dtype)
            entries[SAME_LOOP] = enter(greedy_contender(packed), packed, self.ids, self._memory)
        self._report(f"reading {name}", 1, 1)
        return entries

    def _start(self, name: str) -> None:
        self._report(f"reading {name}", 0, 1)
        self._memory.start()

    def _fit(self, name: str, model: "PreTrainedModel") -> None:
        config = model.config.get_text_config()
        limit = positions(model)
        if limit is not None and self._prompt + self._new_tokens > limit:
            raise HalfplateError(
                f"prompt={self._prompt} and new_tokens={self._new_tokens} exceed the {limit} positions of {name!r}; "
                f"try new_tokens={limit // 3} after a prompt={limit - limit // 3 - 1}"
            )
        from halfplate.runtime.limits import check_generation

        check_generation(config, self._prompt, self._new_tokens, "new_tokens")
        if not self._name:
            self._name, self.ids = name, speed.random_prompt(config.vocab_size, self._prompt)
        elif int(self.ids.max()) >= config.vocab_size:
            raise HalfplateError(
                f"against={name!r} does not have the same vocabulary as {self._name!r}; give the original model that it was compressed from"
            )


def _compared(subject: dict[str, Entry], dense: dict[str, Entry], rounds: Rounds) -> dict[str, Any]:
    """The figures of the model, of the original model in its faster type, and their ratios."""
    ours = COMPRESSED if COMPRESSED in subject else _fastest(list(subject), rounds.decode)
    ours_prefill = COMPRESSED if COMPRESSED in subject else _fastest(list(subject), rounds.prefill)
    result = _best(subject, ours, ours_prefill, rounds)
    if COMPRESSED not in subject:
        result |= {"dtype": ours, "prefill_dtype": ours_prefill}
    by_torch = [name for name in dense if name != SAME_LOOP]
    if by_torch:
        decode, prefill = _fastest(by_torch, rounds.decode), _fastest(by_torch, rounds.prefill)
        result["dense"] = {
            **_best(dense, decode, prefill, rounds),
            "dtype": _dtype(decode),
            "prefill_dtype": _dtype(prefill),
            "dtypes": {_dtype(name): rounds.figures(name, dense[name]) for name in by_torch},
        }
        result["decode_speedup"] = speed.paired_ratio(rounds.decode(ours), rounds.decode(decode))
        result["prefill_speedup"] = speed.paired_ratio(rounds.prefill(ours_prefill), rounds.prefill(prefill))
    extra = {name: entry for name, entry in (subject | dense).items() if name in (GENERATE, SAME_LOOP)}
    if extra:
        result["loops"] = {name: rounds.figures(name, entry) for name, entry in extra.items()}
        for name in extra:
            result["loops"][name]["decode_speedup"] = (
                speed.paired_ratio(rounds.decode(name), rounds.decode(decode)) if by_torch else None
            )
    if SAME_LOOP in dense:
        result["weights_speedup"] = speed.paired_ratio(rounds.decode(ours), rounds.decode(SAME_LOOP))
    return result


def _best(entries: Mapping[str, Entry], decode: str, prefill: str, rounds: Rounds) -> dict[str, Any]:
    """The figures of the contender with the fastest decoding, with the prefill of the one with the fastest prefill."""
    return rounds.figures(decode, entries[decode]) | {"prefill_tokens_per_s": median(rounds.prefill(prefill))}


def _fastest(names: list[str], rates: Callable[[str], list[float]]) -> str:
    return max(names, key=lambda name: median(rates(name)))


def _dtype(name: str) -> str:
    return name.rpartition(" ")[2]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        use_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _check(model: str, prompt: int, new_tokens: int, rounds: int, activations: str, loops: bool) -> None:
    for argument, number, least in (("prompt", prompt, 1), ("new_tokens", new_tokens, 2), ("rounds", rounds, 1)):
        if typed(argument, number, int) < least:
            raise HalfplateError(f"{argument}={number} is too few to time, expected at least {least}")
    if not is_compressed(model) and (activations == "int8" or loops):
        option = "activations='int8'" if activations == "int8" else "loops=True"
        raise HalfplateError(f"{option} is for Halfplate checkpoints, and {model!r} is not one; leave it out")
