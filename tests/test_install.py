"""Installing from source, with and without a working compiler."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path, what, compiler="false"):
    """The sdist or the wheel of a copy of the source tree."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in ("src", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    environment = os.environ | {"CXX": compiler}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, which no compiler takes part in."""
    return build(tmp_path_factory.mktemp("sdist"), "sdist")


def install(sdist, tmp_path, compiler):
    """Install the sdist with `compiler`; returns the folder to import from."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, sdist]
    run = subprocess.run(command, env=os.environ | {"CXX": compiler}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return target


def halfplate(site, *commands):
    """What commands print, all run in one process that imports the package from `site`."""
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    runs = "".join(f"assert main({[str(word) for word in words]!r}) == 0\n" for words in commands)
    command = [sys.executable, "-c", f"from halfplate.cli import main\n{runs}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=site)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_install_without_a_compiler_compresses_and_generates(sdist, tmp_path, tiny_folder):
    site = install(sdist, tmp_path, "false")
    assert not list(site.rglob("*.so"))
    out = tmp_path / "out"
    options = ("--block-size", "8", "--samples", "4", "--seq-len", "32", "--iterations", "2")
    compress, generate = ("compress", tiny_folder, "-o", out, *options), ("generate", out, "The bird")
    said = halfplate(site, ["doctor"], compress, [*generate, "--max-new-tokens", "4"])
    assert "not built" in said
    assert "\nThe bird" in said


def test_install_with_a_compiler_has_native_kernels(sdist, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    # Optimising takes most of the time of a build and changes nothing here; of several -O the last one counts.
    quick = tmp_path / "quick"
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    quick.chmod(0o755)
    site = install(sdist, tmp_path, str(quick))
    assert [path.name for path in site.rglob("*.so")] == ["libhalfplate.so"]
    assert "not built" not in halfplate(site, ["doctor"])


def test_sdist_holds_all_sources_and_the_licence(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".cpp", ".inc", ".h", ".typed")]
    assert len(tracked) > 100
    assert {str(path.relative_to(ROOT)) for path in tracked} <= names
    assert {"LICENSE", "CHANGELOG.md", "README.md", "pyproject.toml", "setup.py", "docs/format.md"} <= names


def test_one_wheel_serves_every_python(tmp_path):
    wheel = build(tmp_path, "wheel")
    assert re.fullmatch(r"halfplate-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)


def test_the_changelog_has_the_version_of_the_package():
    text = (ROOT / "CHANGELOG.md").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sections = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d{2}-\d{2})?$", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    # Until the first release there is none but that.
    assert len(sections) == 1 or sections[1] == version
