"""The compiled library: instruction sets agree, and the package works without it."""

import os
import subprocess
import sys
from functools import cache

import pytest

from halfplate.kernels import native

REPORT = """
import torch
from halfplate.formats.spec import WeightSpec
from halfplate.kernels import native
from halfplate.methods import create
from halfplate.pattern import Pattern
from halfplate.statistics import InputStatistics
generator = torch.Generator().manual_seed(0)
weight = torch.randn(40, 84, generator=generator)
inputs = torch.randn(300, 84, generator=generator).double() @ torch.randn(84, 84, generator=generator).double()
gram = inputs.T @ inputs / 300
statistics = InputStatistics(300, gram.diagonal().float(), gram)
spec = WeightSpec(40, 84, Pattern(2, 4), "fp32", 16, 16, "fp32")
losses = [
    create("armor", objective=objective, iterations=4).compress(weight, statistics, spec).losses[-1]
    for objective in ("diag", "gram")
]
print(native.isa(), *losses)
"""


DOCTOR = (sys.executable, "-m", "halfplate", "doctor")


def isas():
    """The instruction sets that the library says this processor has."""
    return native.library().halfplate_isas().decode().split()


@cache
def report(**environment):
    """Name of the instruction set and the final losses of a small problem, from a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", REPORT], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    isa, *losses = run.stdout.split()
    return isa, [float(loss) for loss in losses]


def assert_close(losses, others):
    assert losses[0] == pytest.approx(others[0], rel=1e-3)
    # Rounding decides near ties, and under the full Gram matrix all later groups of a row follow from one.
    assert losses[1] == pytest.approx(others[1], rel=2e-2)


@pytest.mark.slow
def test_torch_path_reaches_the_same_loss_without_the_library():
    isa, losses = report(HALFPLATE_NATIVE="0")
    assert isa == "none"
    assert_close(losses, report()[1])


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
@pytest.mark.parametrize("forced", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(forced):
    if forced not in isas():
        pytest.skip(f"this processor has no {forced}")
    isa, losses = report(HALFPLATE_ISA=forced)
    assert isa == forced
    assert_close(losses, report(HALFPLATE_NATIVE="0")[1])


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
def test_an_instruction_set_that_the_processor_lacks_is_refused():
    for command in ([*DOCTOR], [*DOCTOR, "--json"]):
        run = subprocess.run(
            command, env=os.environ | {"HALFPLATE_ISA": "amx9"}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 2
        expected = f"HALFPLATE_ISA=amx9 is not an instruction set that this processor has; expected one of {', '.join(isas())}, or leave it unset"
        assert run.stderr.strip() == f"halfplate: error: {expected}"
    version = [sys.executable, "-m", "halfplate", "--version"]
    told = subprocess.run(
        version, env=os.environ | {"HALFPLATE_ISA": "amx9"}, capture_output=True, text=True, check=True
    )
    assert "HALFPLATE_ISA=amx9 is not" in told.stdout


def test_reason_is_given_exactly_where_the_library_is_missing():
    assert bool(native.reason()) != native.available()
    assert (native.isa() == "none") != native.available()
