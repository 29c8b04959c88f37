"""Correctness on the device, against the CPU: the solver, the stored formats, torch's semi-structured products."""

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_session import Absent, Session
from random_weights import random_tensors
from torch import Tensor, nn

from halfplate.formats import Chain, CompressedLinear, WeightSpec, check_stored
from halfplate.formats.quantizers.uniform import INT4
from halfplate.kernels import triton
from halfplate.methods import METHODS, create
from halfplate.methods.solving import relative_error
from halfplate.pattern import DENSE, NONE, Pattern
from halfplate.runtime.backends import Options, pack
from halfplate.runtime.backends.cuda import SEMI_STRUCTURED_PRODUCTS, SemiStructuredLinear
from halfplate.solvers.armor.full_gram import GramSchedule, solve_gram
from halfplate.solvers.armor.sweep import Grid, Levels, sweep_tiles
from halfplate.statistics import InputStatistics

TWO_OF_FOUR = Pattern(2, 4)
EQUAL_LOSS = 1e-5  # relative to the loss of the zero matrix
CPU = torch.device("cpu")
CORES = ("bf16", "fp16", "int8", "int4")


def inputs(d_out: int, d_in: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight (d_out, d_in) and the Gram matrix (d_in, d_in) of correlated random inputs, fp32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    x = torch.randn(4 * d_in, d_in, generator=generator) + 0.5 * torch.randn(4 * d_in, 1, generator=generator)
    return weight, x.T @ x / len(x)


def check_solver(session: Session) -> None:
    """Sweeps on integers, whole solves, and every method."""
    with session.part("the kernel for sweeps"):
        _kernel(session)
    for name, grid in (("2:4", None), ("2:4 on a grid", Levels(INT4, 16))):
        with session.part(f"sweep of {name} on integers"):
            _integer_sweep(session, name, grid)
    d_out, d_in, block = session.size(128, 16), session.size(256, 32), session.size(32, 8)
    for core, pattern in (("bf16", TWO_OF_FOUR), ("int4", TWO_OF_FOUR), ("int4", DENSE)):
        with session.part(f"solve {pattern} {core}"):
            spec = WeightSpec(d_out, d_in, pattern, core, block, block)
            _same_solution(session, f"full Gram, {pattern} {core}", spec)
    for name in METHODS:
        with session.part(f"method {name}"):
            _same_method(session, name)


def _kernel(session: Session) -> None:
    """Whether the kernel runs at all; where it does not, the rest of the run takes torch operations in its place."""
    if not (session.cuda and triton.sweeps(TWO_OF_FOUR)):
        raise Absent("no CUDA device, or no triton")
    try:
        core = torch.zeros(1, 4, 16, device=session.device)
        sweep_tiles(core, core + 1, torch.eye(4).to(core)[None], torch.eye(16).to(core)[None], TWO_OF_FOUR)
        torch.cuda.synchronize()
    except Exception:
        os.environ["HALFPLATE_TRITON"] = "0"
        raise
    session.record.check("the kernel for sweeps runs", True)


def _integer_sweep(session: Session, name: str, levels: Levels | None) -> None:
    """One sweep over several tiles whose error, core and Gram matrices are small whole numbers."""
    generator = torch.Generator().manual_seed(1)
    tiles, rows, cols = session.size(8, 2), session.size(16, 4), session.size(64, 32)
    whole = [torch.randint(-2, 3, (tiles, n, n), generator=generator).float() for n in (rows, cols)]
    core = torch.randint(-3, 4, (tiles, rows, cols), generator=generator).float()
    core *= torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(cols // 4)
    error = torch.randint(-9, 10, core.shape, generator=generator).float()
    grams = [one @ one.mT + 4 * torch.eye(one.shape[1]) for one in whole]

    def sweep(device: torch.device) -> Tensor:
        grid = None if levels is None else Grid(torch.ones(tiles, rows, cols // levels.group, device=device), levels)
        moved = (core.to(device), error.to(device), grams[0].to(device), grams[1].to(device))
        return sweep_tiles(*moved, TWO_OF_FOUR, grid).cpu()

    expected, found = sweep(CPU), sweep(session.device)
    moved = int(((expected != 0) != (found != 0)).sum())
    session.record.check(f"sweep of {name}: equal masks on integers", moved == 0, f"{moved} positions differ")
    worst = float((expected - found).abs().max())
    session.record.check(f"sweep of {name}: equal values on integers", worst <= 1e-4, f"at most {worst:.1e} apart")


def _same_solution(session: Session, name: str, spec: WeightSpec) -> None:
    """The whole solve on the device and on the CPU: the losses of every iteration, and the stored result."""
    weight, gram = inputs(spec.d_out, spec.d_in)
    schedule = GramSchedule(diagonal=3, gram=3, grid=2)
    errors, losses = [], []
    for device in (CPU, session.device):
        chain, found = solve_gram(weight.to(device), gram.to(device), spec, schedule)
        check_stored(spec, chain.tensors(), name)
        statistics = InputStatistics(1, gram.diagonal(), gram)
        errors.append(relative_error(weight, chain.dense().cpu(), statistics)[0])
        losses.append(found)
    apart = max((abs(a - b) for a, b in zip(*losses, strict=False)), default=0.0)
    passed = apart <= EQUAL_LOSS and abs(errors[0] - errors[1]) <= EQUAL_LOSS
    said = f"losses at most {apart:.1e} apart, stored error {errors[0]:.6f} and {errors[1]:.6f}"
    session.record.check(f"{name}: equal loss to {EQUAL_LOSS:g}", passed, said)


def _same_method(session: Session, name: str) -> None:
    """One method with its default options, few iterations where it has any."""
    method = create(name).quick()
    block = 8 if method.wrapped else 0
    pattern = NONE if method.coreless else TWO_OF_FOUR if method.sparse else DENSE
    spec = WeightSpec(32, 64, pattern, "bf16" if method.sparse or method.coreless else "int4", block, block)
    spec = replace(spec, rank=4 if method.low_rank else 0, permuted=method.permutes, parts=method.parts)
    spec = method.sized(spec) if method.coreless else spec
    weight, gram = inputs(32, 64)
    errors = []
    for device in (CPU, session.device):
        statistics = InputStatistics(256, gram.diagonal().to(device), gram.to(device))
        try:
            solution = method.compress(weight.to(device), statistics, spec)
        except ModuleNotFoundError as missing:
            session.record.absent(f"method {name}", f"no package {missing.name}")
            return
        reference = InputStatistics(256, gram.diagonal(), gram)
        errors.append(relative_error(weight, solution.weight.dense().cpu(), reference)[0])
    apart = abs(errors[0] - errors[1])
    said = f"error {errors[0]:.6f} and {errors[1]:.6f}"
    session.record.check(f"method {name}: the error of the CPU", apart <= 1e-4, said)


def random_linear(
    spec: WeightSpec, device: torch.device, seed: int = 0, bias: bool = False, made_on: torch.device = CPU
) -> CompressedLinear:
    """A compressed linear of random stored tensors. made_on: the CPU gives the same everywhere, the device is quicker."""
    with torch.random.fork_rng(devices=[]), made_on:
        torch.manual_seed(seed)
        tensors = random_tensors(spec) | ({"bias": torch.randn(spec.d_out)} if bias else {})
    module = CompressedLinear(spec, bias, device="meta", bias_dtype=torch.float32 if bias else None)
    module.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return module.requires_grad_(False)


def specs(session: Session) -> Iterator[WeightSpec]:
    """Kinds of matrices: core types, patterns, wrappers that divide the size and that do not."""
    d_out, d_in, block = session.size(512, 32), session.size(1024, 64), session.size(128, 8)
    for core in CORES:
        for pattern in (TWO_OF_FOUR, DENSE):
            yield WeightSpec(d_out, d_in, pattern, core, block, block, "bf16")
    yield WeightSpec(d_out, d_in, TWO_OF_FOUR, "int4", block, block, "int8")
    yield WeightSpec(d_out, d_in, TWO_OF_FOUR, "int8", 0, block)
    yield WeightSpec(d_out, d_in, TWO_OF_FOUR, "bf16", 3 * block // 2, 3 * block // 2)
    yield WeightSpec(d_out, d_in, TWO_OF_FOUR, "bf16", 1, 1)
    yield WeightSpec(d_out, d_in, TWO_OF_FOUR, "bf16")


def _spoken(spec: WeightSpec) -> str:
    return f"{spec.pattern} {spec.core_dtype}, blocks {spec.out_block} and {spec.in_block} of {spec.wrapper_dtype}"


def check_formats(session: Session) -> None:
    """What is stored stands for the same numbers on the device, and its plain torch product is right there."""
    for spec in specs(session):
        with session.part(f"format {_spoken(spec)}"):
            module, there = random_linear(spec, CPU), random_linear(spec, session.device)
            check_stored(spec, there.stored(), "check")
            dense, found = module.matrix.dense(), there.matrix.dense().cpu()
            # Sums of the wrappers run in another order there.
            apart = float((dense - found).norm() / dense.norm())
            x = torch.randn(5, spec.d_in, generator=torch.Generator().manual_seed(2))
            y, expected = there(x.to(session.device)).cpu(), x @ dense.T
            off = float((y - expected).norm() / expected.norm())
            said = f"dense form {apart:.1e}, product {off:.1e}"
            session.record.check(f"format {_spoken(spec)}", apart <= 1e-6 and off <= 1e-5, said)
    with session.part("solved on the device, stored, read on the CPU"):
        weight, gram = inputs(32, 64)
        spec = WeightSpec(32, 64, TWO_OF_FOUR, "bf16", 8, 8)
        chain, _ = solve_gram(weight.to(session.device), gram.to(session.device), spec, GramSchedule(1, 1, 1))
        moved = Chain.from_tensors(spec, {name: tensor.cpu() for name, tensor in chain.tensors().items()})
        apart = float((chain.dense().cpu() - moved.dense()).abs().max())
        session.record.check("solved on the device, read on the CPU", apart <= 1e-5, f"at most {apart:.1e} apart")


def prepared(session: Session, module: CompressedLinear) -> nn.Module:
    """The linear as `accelerate` prepares it on a GPU; on the CPU the same module around a dense core, for the test.

    Raises Absent with the reason where it stays on its torch path.
    """
    if not session.cuda:
        dtype = torch.float16 if module.spec.core_dtype == "fp16" else torch.bfloat16
        return SemiStructuredLinear(module, dtype, pack=lambda dense: dense)
    found = pack(module, Options(), [SEMI_STRUCTURED_PRODUCTS])
    if isinstance(found, str):
        raise Absent(found)
    return found


def check_semi_structured(session: Session) -> None:
    """torch's semi-structured products with our wrappers around them, against the dense product in fp32."""
    for spec in specs(session):
        if spec.pattern.is_dense:
            continue
        with session.part(f"semi-structured {_spoken(spec)}"):
            bias = spec.core_dtype == "int8"
            module = random_linear(spec, session.device, bias=bias)
            product = prepared(session, module)
            dense = module.matrix.dense()
            kind = type(getattr(product, "core", None)).__name__
            worst = 0.0
            for tokens in (1, 3, 16, 64, 200):
                generator = torch.Generator().manual_seed(tokens)
                x = torch.randn(tokens, spec.d_in, generator=generator).to(session.device).to(torch.bfloat16)
                expected = x.float() @ dense.T + (module.bias if bias else 0)
                y = product(x).float()
                worst = max(worst, float((y - expected).norm() / expected.norm()))
            # Three products in bf16, each of which rounds its result.
            name = f"semi-structured {_spoken(spec)}"
            session.record.check(name, worst < 0.01, f"relative error at most {worst:.1e}, {kind}")
    with session.part("semi-structured product under torch.compile"):
        if session.cuda:
            _compiled(session)
    with session.part("matrices without a product stay on the torch path"):
        module = random_linear(WeightSpec(32, 64, Pattern(4, 8)), session.device)
        reason = pack(module, Options(), [SEMI_STRUCTURED_PRODUCTS])
        session.record.check("4:8 keeps the torch path and says why", isinstance(reason, str), str(reason))


def _compiled(session: Session) -> None:
    spec = WeightSpec(512, 1024, TWO_OF_FOUR, "bf16", 128, 128)
    product = prepared(session, random_linear(spec, session.device))
    x = torch.randn(16, 1024, device=session.device, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain, compiled = product(x), torch.compile(product)(x)
    off = float((plain - compiled).norm() / plain.norm())
    session.record.check("semi-structured product under torch.compile", off < 0.01, f"{off:.1e}")
