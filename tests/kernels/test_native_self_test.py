"""The kernels' own self-test in C++: under sanitizers, and for NEON where the cross-compiler and qemu are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "native" / "run.sh"


def run(mode, cases):
    found = subprocess.run(["bash", RUN, mode, str(cases)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-3000:]
    return found.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_no_case_leaves_its_bounds_or_is_undefined():
    assert "400 cases on baseline" in run("sanitize", 400)


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="g++-aarch64-linux-gnu and qemu-user are not installed",
)
def test_neon_is_right_under_emulation():
    assert "200 cases on baseline" in run("aarch64", 200)
