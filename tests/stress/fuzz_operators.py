"""The native operators under random defaults of torch: what they return must be what they return under the usual ones.

    python tests/stress/fuzz_operators.py --cases 20000 --seed 0

A case takes an operator (a linear of any core, pattern and wrappers; a step of the decoder; a sweep or a moment of the solver),
computes it under the usual defaults and beside it by torch, and then again under foreign ones: default dtype, default device
meta, inference mode, autocast, another thread, several OpenMP threads. The results must be equal, bit for bit; those with products of
torch itself, whose sums follow the number of threads on some processors, must be near. The sanitizers run over the same native code
in tests/kernels/native.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from stored_linears import factors, random_linear

from halfplate.formats import WeightSpec
from halfplate.formats.quantizers.uniform import INT4
from halfplate.kernels import linear
from halfplate.kernels.group import multiply_group
from halfplate.pattern import DENSE, Pattern
from halfplate.runtime import accelerate
from halfplate.runtime.cache import GrowingCache
from halfplate.solvers.armor import gram as full
from halfplate.solvers.armor.problem import Factors, Problem
from halfplate.solvers.armor.stages import NativeStages, TorchStages
from halfplate.solvers.armor.sweep import Levels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCKS = (0, 0, 1, 4, 8, 12, 32, 200)
Results = tuple[
    list[Tensor], list[Tensor]
]  # those that must be equal, and those with products of torch, which must be near
Operator = Callable[[], Results]


@contextmanager
def foreign(chance: random.Random) -> Iterator[str]:
    """Random defaults of torch; yields what they are."""
    dtype, device = chance.choice(DTYPES), chance.choice(("cpu", "meta"))
    inference, cast, threads = chance.random() < 0.5, chance.random() < 0.5, chance.randint(1, 6)
    before, count = torch.get_default_dtype(), torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        stack.callback(torch.set_num_threads, count)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=cast))
        if device != "cpu":
            stack.enter_context(torch.device(device))
        yield f"{dtype} on {device}, inference {inference}, autocast {cast}, {threads} threads"


def a_linear(chance: random.Random) -> Operator:
    """A packed linear, multiplied as it is and by the expanded core, and what it was packed from."""
    pattern = chance.choice((Pattern(2, 4), DENSE))
    spec = WeightSpec(
        d_out=chance.randint(1, 40),
        d_in=4 * chance.randint(1, 60) if str(pattern) != "dense" else chance.randint(1, 240),
        pattern=pattern,
        core_dtype=chance.choice(("fp32", "bf16", "fp16", "int8", "int4", "int3", "int2")),
        out_block=chance.choice(BLOCKS),
        in_block=chance.choice(BLOCKS),
        wrapper_dtype=chance.choice(("fp32", "bf16", "fp16", "int8")),
    )
    seed, activations = chance.randrange(2**20), chance.choice(("float", "int8"))
    tensors = random_linear(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(spec.d_out, generator=generator) if chance.random() < 0.5 else None
    x = torch.randn(chance.randint(1, 6), spec.d_in, generator=generator).to(chance.choice(DTYPES))

    def run() -> Results:
        packed = linear.pack(spec, tensors, activations, bias)
        grouped = multiply_group(x, [[packed, packed]], [len(x)], [spec.d_out] * 2)
        results = [linear.multiply(x, packed, spec.d_out), grouped, *linear.unpack(spec, packed).values()]
        header = linear.read_header(packed)
        return results, [] if header.activations else [linear._multiply_expanded(x, packed, header)]

    if activations == "float":
        f = factors(spec, tensors)
        expected = x.double() @ (f.out @ f.core @ f.into).T + (0 if bias is None else bias.double())
        # Rounding is relative to the sum of magnitudes.
        bound = x.double().abs() @ (f.out.abs() @ f.core.abs() @ f.into.abs()).T + (0 if bias is None else bias.abs())
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(x.dtype, 1e-6)
        found = run()[0][0].double()
        assert ((found - expected).abs() <= 2 * step * bound)[found.isfinite()].all(), spec  # fp16 may overflow
    return run


def a_decoder(chance: random.Random) -> Operator:
    """Logits of a few native steps after a prompt."""
    from conftest import build_model

    architecture, options = chance.choice(
        (("llama", {}), ("qwen3", {"head_dim": 20}), ("gemma2", {}), ("gemma3_text", {}), ("phi3", {}), ("olmo2", {}))
    )
    plain = build_model(architecture, seed=chance.randrange(100), **options)
    ids = torch.tensor([[chance.randrange(3, 128) for _ in range(8)]])
    with torch.no_grad():
        expected = plain(ids).logits[0, 4:]
    accelerate(plain)

    def run() -> Results:
        from halfplate.models.arguments import cache_argument

        plain._native_decoder = None  # its tables and its scratch are made anew
        cache = GrowingCache(plain.config.num_hidden_layers)
        with torch.no_grad(), usual():
            plain(input_ids=ids[:, :4], **{cache_argument(plain.forward): cache}, use_cache=True)
        return [plain.native_decoder.step(int(token), cache) for token in ids[0, 4:].tolist()], []

    torch.testing.assert_close(torch.stack(run()[0]), expected, rtol=1e-4, atol=1e-4)
    return run


@contextmanager
def usual() -> Iterator[None]:
    """torch's own defaults, for what is transformers' part."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"), torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.no_grad():
        yield
    torch.set_default_dtype(before)


def a_stage(chance: random.Random) -> Operator:
    """The stages of the solver under the diagonal objective."""
    pattern = Pattern.parse(chance.choice(("2:4", "4:8", "1:3", "dense")))
    spec = WeightSpec(
        chance.randint(1, 40),
        pattern.m * chance.randint(1, 12),
        pattern,
        "fp32",
        chance.choice((0, 1, 4, 8)),
        chance.choice((0, 1, 8 * pattern.m)),
        "fp32",
    )
    generator = torch.Generator().manual_seed(chance.randrange(2**20))
    weight, moment = torch.randn(spec.d_out, spec.d_in, generator=generator), torch.rand(spec.d_in, generator=generator)
    problem = Problem.from_weight(weight, moment, spec)
    start = problem.start()
    core = start.core.clone()

    def run() -> Results:
        factors = Factors(start.out_blocks, core.clone(), start.in_blocks)
        stages = NativeStages()
        out, into = stages.output_moments(problem, factors), stages.input_moments(problem, factors)
        stages.sweep(problem, factors)
        return [out.cross, out.square, into.cross, into.square, out.tile_losses, factors.core], []

    slow = TorchStages().output_moments(problem, start)
    torch.testing.assert_close(run()[0][1], slow.square, rtol=1e-3, atol=1e-3)
    return run


def a_gram_sweep(chance: random.Random) -> Operator:
    """The sweep under the full Gram objective, of real values or on a grid."""
    pattern = Pattern.parse(chance.choice(("2:4", "1:4", "dense")))
    spec = WeightSpec(
        chance.randint(1, 24), pattern.m * chance.randint(1, 24), pattern, "fp32", chance.choice((0, 4)), 0, "fp32"
    )
    generator = torch.Generator().manual_seed(chance.randrange(2**20))
    weight = torch.randn(spec.d_out, spec.d_in, generator=generator)
    x = torch.randn(3 * spec.d_in, spec.d_in, generator=generator).double()
    tiles = Problem.from_weight(weight, torch.ones(spec.d_in), spec)
    problem = full.GramProblem.from_tiles(tiles, x.T @ x / len(x))
    start, levels = tiles.start(), Levels(INT4) if chance.random() < 0.5 else None
    steps = None
    if levels is not None:
        steps = (
            torch.rand(len(tiles.weight), -(-tiles.weight.shape[1] // levels.group), generator=generator) * 0.2 + 0.01
        )
        steps = steps.half().float()

    def run() -> Results:
        point = full.swept(problem, start, steps, levels, off_grid=levels is not None)
        return [], [point.factors.core, point.product] + ([] if point.steps is None else [point.steps])

    return run


OPERATORS = {
    "linear": (a_linear, 0.7),
    "solver": (a_stage, 0.15),
    "gram": (a_gram_sweep, 0.13),
    "decoder": (a_decoder, 0.02),
}


def case(chance: random.Random, name: str) -> None:
    """One operator under the usual and under foreign defaults; raises AssertionError if they differ."""
    run = OPERATORS[name][0](chance)
    expected = run()

    def again() -> tuple[str, Results]:
        with foreign(chance) as told:
            # The products of torch inside the Gram sweep follow autocast as any of the caller's do, so plain ones are asked for.
            if name == "gram":
                with torch.autocast("cpu", enabled=False):
                    return told, run()
            return told, run()

    if chance.random() < 0.3:
        with ThreadPoolExecutor(1) as pool:
            told, found = pool.submit(again).result()
    else:
        told, found = again()
    for place, near in enumerate((False, True)):
        for one, other in zip(expected[place], found[place], strict=True):
            assert one.dtype == other.dtype, (name, told)
            assert one.device == other.device, (name, told)
            if near:
                far = max(1e-3, 2 * torch.finfo(one.dtype).eps) * float(one.nan_to_num().abs().max())
                torch.testing.assert_close(other, one, rtol=0, atol=far, equal_nan=True, msg=f"{name}: {told}")
            else:
                assert torch.equal(one, other), (name, told)


def fuzz(cases: int, seed: int) -> dict[str, int]:
    """Run so many cases; how many there were of each operator."""
    chance, counts = random.Random(seed), Counter[str]()
    names, shares = list(OPERATORS), [share for _, share in OPERATORS.values()]
    for _ in range(cases):
        name = chance.choices(names, shares)[0]
        case(chance, name)
        counts[name] += 1
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args()
    print(fuzz(options.cases, options.seed))


if __name__ == "__main__":
    main()
