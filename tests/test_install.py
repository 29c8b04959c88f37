"""Installing from source, with and without a working compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def install(tmp_path, compiler):
    """Build and install a copy of the source tree with `compiler`; returns the folder to import from."""
    source, target = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, source]
    run = subprocess.run(command, env=os.environ | {"CXX": compiler}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return target


def halfplate(site, *arguments):
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "halfplate", *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=site)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_install_without_a_compiler_compresses_and_generates(tmp_path, tiny_folder):
    site = install(tmp_path, "false")
    assert not list(site.rglob("*.so"))
    assert "not built" in halfplate(site, "doctor")
    out = tmp_path / "out"
    options = ("--block-size", "8", "--samples", "4", "--seq-len", "32", "--iterations", "2")
    halfplate(site, "compress", tiny_folder, "-o", out, *options)
    assert halfplate(site, "generate", out, "The bird", "--max-new-tokens", "4").startswith("The bird")


def test_install_with_a_compiler_has_native_kernels(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    site = install(tmp_path, compiler)
    assert [path.name for path in site.rglob("*.so")] == ["libhalfplate.so"]
    assert "not built" not in halfplate(site, "doctor")
