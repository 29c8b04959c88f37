"""The solver: one matrix on the device against the CPU, and a whole model by extrapolation."""

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_checks import inputs
from gpu_decode import llama_8b, random_llama
from gpu_model_checks import TEXT, any_transformers, save_tiny
from gpu_session import OutOfTime, Session
from gpu_timing import once
from torch import Tensor

import halfplate
from halfplate.formats import WeightSpec
from halfplate.kernels import native
from halfplate.pattern import Pattern
from halfplate.solvers.armor import gram as gram_solver
from halfplate.solvers.armor.full_gram import GramSchedule, solve_gram

TWO_OF_FOUR = Pattern(2, 4)
ITERATIONS = 20
SHAPES = {"solve_4096": (4096, 4096), "solve_14336": (4096, 14336)}
CPU = torch.device("cpu")
SAMPLES, SEQ_LEN, BLOCKS, LAYERS = 64, 512, 32, 4


def solve_times(session: Session) -> None:
    """Seconds of 20 iterations under the diagonal and 20 under the full Gram, at block 128."""
    if not native.available():
        session.record.write("note", f"the CPU solves on its torch path: {native.reason()}")
    for key, (d_out, d_in) in SHAPES.items():
        with session.part(key):
            _solve_time(session, key, session.size(d_out, 16), session.size(d_in, 64))


def _solve_time(session: Session, key: str, d_out: int, d_in: int) -> None:
    block = session.size(128, 8)
    spec = WeightSpec(d_out, d_in, TWO_OF_FOUR, "bf16", block, block)
    weight, gram = random_problem(d_out, d_in, session.device)
    # The device first: its figure is worth something without the other.
    device, how = _seconds_of(spec, weight, gram, session)
    session.record.measured(f"solve {d_out} × {d_in} on {session.device.type}", device, "s", how=how)
    cpu, cpu_how = _extrapolated(spec, weight.to(CPU), gram.to(CPU), CPU)
    session.record.measured(
        f"solve {d_out} × {d_in} on the CPU", cpu, "s", how=cpu_how, threads=torch.get_num_threads()
    )
    if not session.tiny:
        session.record.goal(key, cpu / device, f"device: {how}; CPU: {cpu_how}")


def random_problem(d_out: int, d_in: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, fp32, made on `device`."""
    if d_in <= 256:
        weight, gram = inputs(d_out, d_in)
        return weight.to(device), gram.to(device)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(d_out, d_in, device=device, generator=generator)
    x = torch.randn(2 * d_in, d_in, device=device, generator=generator)
    x += 0.5 * torch.randn(2 * d_in, 1, device=device, generator=generator)
    return weight, x.T @ x / len(x)


def _seconds_of(spec: WeightSpec, weight: Tensor, gram: Tensor, session: Session) -> tuple[float, str]:
    """Seconds of the whole solve, measured where a kernel sweeps, else from a few rows of a sweep in torch operations."""
    if session.cuda and not _has_kernel(spec):
        return _by_rows(spec, weight, gram, session.device)
    if session.tiny:
        return _extrapolated(spec, weight, gram, session.device)
    warm = GramSchedule(1, 1, 0)  # compiles the kernels
    solve_gram(weight, gram, spec, warm)
    schedule = GramSchedule(ITERATIONS, ITERATIONS, 0)
    return once(partial(solve_gram, weight, gram, spec, schedule), session.device), "whole"


def _has_kernel(spec: WeightSpec) -> bool:
    try:
        from halfplate.kernels import triton
    except ImportError:
        return False
    return bool(triton.sweeps(spec.pattern))


def _extrapolated(spec: WeightSpec, weight: Tensor, gram: Tensor, device: torch.device) -> tuple[float, str]:
    """From the seconds of one iteration and of two: the second has momentum, as all later ones."""
    first, second = (
        once(partial(solve_gram, weight, gram, spec, GramSchedule(count, count, 0)), device) for count in (1, 2)
    )
    return first + (ITERATIONS - 1) * max(second - first, 0.0), f"extrapolated from 2 of {ITERATIONS} iterations"


def _by_rows(spec: WeightSpec, weight: Tensor, gram: Tensor, device: torch.device) -> tuple[float, str]:
    """From one row of each tile: on a device, torch's sweep waits for its launches, which are equal for every row."""
    real = gram_solver.sweep_tiles
    seconds: dict[str, float] = {}

    def one_row(core: Tensor, error: Tensor, out_gram: Tensor, in_gram: Tensor, *rest: Any) -> Tensor:
        part = core[:, :1], error[:, :1], out_gram[:, :1, :1], in_gram
        seconds["row"] = once(partial(real, *part, *rest), device)
        return core

    setattr(gram_solver, "sweep_tiles", one_row)  # noqa: B010  (mypy takes no assignment to a function)
    try:
        whole = once(partial(solve_gram, weight, gram, spec, GramSchedule(0, 1, 0)), device)
    finally:
        setattr(gram_solver, "sweep_tiles", real)  # noqa: B010
    rows = min(spec.out_block, spec.d_out)
    iteration = whole - seconds["row"] + rows * seconds["row"]
    return ITERATIONS * iteration, f"torch operations, from 1 of {rows} rows of one sweep, without the diagonal start"


def compress_whole(session: Session) -> None:
    """`halfplate.compress` of a few blocks of an 8B shape; what is cut off is extrapolated from the matrices that were done."""
    layers = session.size(LAYERS, 1)
    with TemporaryDirectory(prefix="halfplate-gpu-") as scratch, any_transformers(session):
        folder = Path(scratch)
        _save_large(session, folder, layers)
        watch = _Watch(session)
        samples, seq_len = session.size(SAMPLES, 4), session.size(SEQ_LEN, 32)
        recipe = halfplate.Recipe(
            calibration=str(folder / "text.txt"),
            samples=samples,
            seq_len=seq_len,
            block_size=session.size(128, 8),
            device=session.device.type,
            method_options={} if not session.tiny else {"iterations": 1},
        )
        try:
            halfplate.compress(str(folder / "dense"), folder / "out", recipe, report=watch, benchmark=False)
        except OutOfTime:
            watch.close()
            raise
        watch.close()


class _Watch:
    """Keeps what a run reports of its matrices, and says at the end how long all blocks would take."""

    def __init__(self, session: Session) -> None:
        self.session, self.start = session, time.monotonic()
        self.seconds: dict[str, float] = {}
        self.solving_began: float | None = None

    def __call__(
        self, phase: str, done: int, total: int, *args: Any, facts: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        if phase == "compressing" and self.solving_began is None:
            self.solving_began = time.monotonic()
        if facts and facts.get("event") == "matrix":
            self.seconds[facts["name"]] = facts["seconds"]
            self.session.record.measured(f"compress {facts['name']}", facts["seconds"], "s")

    def close(self) -> None:
        """The extrapolation: seconds by floating-point operations of the method, and the rest by blocks."""
        record = self.session.record
        if not self.seconds or self.solving_began is None:
            record.absent("time of a whole compression", "no matrix was done in time")
            return
        method = halfplate.Recipe().create_method()
        block = self.session.size(128, 8)

        def work(name: str) -> float:
            d_out, d_in = shape_of(name.rsplit(".", 1)[1], self.session)
            return method.flops(WeightSpec(d_out, d_in, TWO_OF_FOUR, "bf16", block, block))

        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        done, spent = sum(work(name) for name in self.seconds), sum(self.seconds.values())
        solving = spent * sum(work(f".{name}") for name in names) / done * BLOCKS
        blocks = len(self.seconds) / len(names)
        other = max(time.monotonic() - self.solving_began - spent, 0.0) / max(blocks, 1.0) * BLOCKS
        before = self.solving_began - self.start
        minutes = (before + solving + other) / 60
        how = f"from {len(self.seconds)} matrices; solving {solving / 60:.1f} min, statistics {other / 60:.1f} min"
        record.measured("compress, all blocks", minutes, "min", how=how)
        if not self.session.tiny:
            record.goal("compress_8b", minutes, how)


def shape_of(linear: str, session: Session) -> tuple[int, int]:
    """(d_out, d_in) of one linear of the 8B shape, or of its tiny stand-in."""
    config = llama_8b(session)
    heads, kv = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    hidden, ffn = config.hidden_size, config.intermediate_size
    return {
        "q_proj": (heads, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, heads),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }[linear]


def _save_large(session: Session, folder: Path, layers: int) -> None:
    """An 8B shape of so many blocks, random weights, with the tokenizer of the tiny model and a text."""
    save_tiny(folder / "dense")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / "dense" / name).unlink(missing_ok=True)
    config = llama_8b(session)
    config.num_hidden_layers = layers
    model = random_llama(config, session.device)
    model.save_pretrained(folder / "dense")
    del model
    session.free()
    (folder / "text.txt").write_text(TEXT * session.size(2000, 30))
    assert json.loads((folder / "dense" / "config.json").read_text())["num_hidden_layers"] == layers
