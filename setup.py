"""Builds the native library beside the package; everything else stands in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so one build serves every Python and torch. Without a
working compiler the package installs all the same and runs on its torch path (`halfplate doctor` says which it is).
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/halfplate/kernels/src")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx512vnni"),
        "-mprefer-vector-width=512",
    ],
}


def object_files() -> dict[str, list[str]]:
    """Translation units of this machine's architecture with the flags of each."""
    flags: dict[str, list[str]] = {"baseline": []}
    if platform.machine() in ("x86_64", "AMD64"):
        flags |= ISA_FLAGS
    parts = {f"{part}_{isa}": flags[isa] for part in ("armor", "runtime") for isa in flags}
    return {"native": [], "pack": []} | parts


class BuildNative(build_ext):
    """Compiles the C++ sources with $CXX into one shared library; a failure leaves it out and says so."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        scratch = Path(self.build_temp)
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            jobs = []
            for name, flags in object_files().items():
                command = [
                    *compiler,
                    *COMMON,
                    *flags,
                    "-c",
                    str(SOURCES / f"{name}.cpp"),
                    "-o",
                    str(scratch / f"{name}.o"),
                ]
                jobs.append((command, subprocess.Popen(command)))
            for command, job in jobs:
                if job.wait():
                    raise subprocess.CalledProcessError(job.returncode, command)
            objects = [str(scratch / f"{name}.o") for name in object_files()]
            subprocess.run([*compiler, "-shared", "-fopenmp", *objects, "-o", str(target)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            print(
                f"halfplate: the native kernels were not built ({error}); the slow torch path will be used",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(extension.name)
            if built.exists():
                self.copy_file(str(built), str(Path("src") / self.get_ext_filename(extension.name)))


class WheelOfEveryPython(bdist_wheel):
    """A wheel for one platform and any Python 3: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("halfplate.kernels.libhalfplate", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelOfEveryPython},
)
