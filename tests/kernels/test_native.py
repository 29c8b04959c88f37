"""The compiled library: instruction sets agree, and the package works without it."""

import os
import subprocess
import sys

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
statistics = InputStatistics(10, torch.rand(84, generator=generator))
spec = WeightSpec(40, 84, Pattern(2, 4), "fp32", 16, 16, "fp32")
print(native.isa(), create("armor", iterations=4).compress(weight, statistics, spec).losses[-1])
"""


def report(**environment):
    """Name of the instruction set and the final loss of a small problem, from a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", REPORT], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    isa, loss = run.stdout.split()
    return isa, float(loss)


def test_torch_path_reaches_the_same_loss_without_the_library():
    isa, loss = report(HALFPLATE_NATIVE="0")
    assert isa == "none"
    assert loss == pytest.approx(report()[1], rel=1e-3)


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
@pytest.mark.parametrize("forced", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(forced):
    isa, loss = report(HALFPLATE_ISA=forced)
    assert isa in (forced, "baseline")  # a processor without it falls back
    assert loss == pytest.approx(report(HALFPLATE_NATIVE="0")[1], rel=1e-3)


def test_reason_is_given_exactly_where_the_library_is_missing():
    assert bool(native.reason()) != native.available()
    assert (native.isa() == "none") != native.available()
