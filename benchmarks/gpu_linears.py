"""One linear at a time: A·S·B through torch's semi-structured products against dense bf16."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_checks import prepared, random_linear
from gpu_session import Absent, Session
from gpu_timing import Timing, copies_of, random_rows, timed
from torch.nn import functional

from halfplate.formats import WeightSpec
from halfplate.pattern import Pattern

TWO_OF_FOUR = Pattern(2, 4)
BATCHES = (1, 4, 16, 64)
PREFILL = 4096
SHAPES = ((4096, 4096), (14336, 4096))
BLOCK = 128
DENSE = "dense bf16"
Product = Callable[[torch.Tensor], torch.Tensor]


def ceilings(session: Session) -> None:
    """What the device gives at best: bytes a second of a copy, operations a second of a bf16 product."""
    device = session.device
    source = torch.randn(session.size(2**29, 2**12), device=device)
    target = torch.empty_like(source)
    seconds = timed([partial(target.copy_, source)], device).seconds
    session.record.measured("device copy", 2 * source.nbytes / seconds / 1e9, "GB/s")
    del source, target
    size = session.size(8192, 64)
    x, y = (random_rows(size, size, device, torch.bfloat16) for _ in range(2))
    seconds = timed([partial(torch.matmul, x, y)], device).seconds
    session.record.measured(f"bf16 product of {size}²", 2 * size**3 / seconds / 1e12, "TFLOP/s")


def decode_linears(session: Session) -> None:
    """Batch 1 to 64, every contender in a CUDA graph over more weights than the cache holds."""
    for shape in _shapes(session):
        with session.part(f"linear {shape}, decode"):
            _compare(session, shape, BATCHES, "decode")


def prefill_linears(session: Session) -> None:
    """4096 tokens at once."""
    for shape in _shapes(session):
        with session.part(f"linear {shape}, prefill"):
            _compare(session, shape, (session.size(PREFILL, 32),), "prefill")


def _shapes(session: Session) -> tuple[tuple[int, int], ...]:
    return ((32, 64),) if session.tiny else SHAPES


def contenders(session: Session, d_out: int, d_in: int) -> dict[str, Callable[[int], Product]]:
    """What multiplies x (tokens, d_in) with one weight, by name: seed -> product."""
    block = session.size(BLOCK, 8)

    def dense(seed: int) -> Product:
        weight = random_rows(d_out, d_in, session.device, torch.bfloat16)
        return lambda x: functional.linear(x, weight)

    def ours(core: str, blocks: int, seed: int) -> Product:
        spec = WeightSpec(d_out, d_in, TWO_OF_FOUR, core, blocks, blocks)
        return prepared(session, random_linear(spec, session.device, seed, made_on=session.device))

    return {
        DENSE: dense,
        "2:4 bf16, no wrappers": partial(ours, "bf16", 0),
        f"A·S·B bf16, block {block}": partial(ours, "bf16", block),
        **_kernels(session, d_out, d_in, block),
    }


def _kernels(session: Session, d_out: int, d_in: int, block: int) -> dict[str, Callable[[int], Product]]:
    """Those of `halfplate.kernels.triton`; there are none for linears yet."""
    return {}


def _compare(session: Session, shape: tuple[int, int], batches: Sequence[int], phase: str) -> None:
    """Time every contender at every number of tokens; the goals are those of batch 1 and of the prefill."""
    d_out, d_in = shape
    found: dict[tuple[str, int], Timing] = {}
    # Products of many tokens wait for arithmetic and not for weights.
    copies = copies_of(2 * d_out * d_in, session.device) if phase == "decode" else 1
    for name, make in contenders(session, d_out, d_in).items():
        try:
            products = [make(seed) for seed in range(copies)]
        except Absent as reason:
            session.record.absent(f"{name}, {d_out} × {d_in}", str(reason))
            continue
        for tokens in batches:
            x = random_rows(tokens, d_in, session.device, torch.bfloat16)
            with torch.inference_mode():
                timing = timed([partial(product, x) for product in products], session.device)
            found[name, tokens] = timing
            _write(session, f"{phase} {d_out} × {d_in}, {tokens} tokens, {name}", timing, found.get((DENSE, tokens)))
        del products
        session.free()
    if session.tiny:
        return
    for name, tokens in list(found):
        if name.startswith("A·S·B bf16") and tokens == batches[0] and (DENSE, tokens) in found:
            ratio = found[DENSE, tokens].seconds / found[name, tokens].seconds
            session.record.goal(f"{'decode_bf16' if phase == 'decode' else 'prefill'}_{d_out}", ratio)


def _write(session: Session, name: str, timing: Timing, dense: Timing | None) -> None:
    facts: dict[str, Any] = {} if dense is None else {"against_dense": round(dense.seconds / timing.seconds, 3)}
    if not timing.graph:
        facts["no_graph"] = timing.why_not
    session.record.measured(name, 1e6 * timing.seconds, "us", **facts)
