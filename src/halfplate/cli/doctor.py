"""Show what this machine can run: versions, threads, processor features, kernels, GPU."""

import argparse
import platform
from typing import Any

from halfplate.cli.parser import add_output_arguments
from halfplate.limits import cores
from halfplate.processor import processor_facts, processor_name

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy")
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser, progress=False)


def run(args: argparse.Namespace) -> int:
    from halfplate.cli.console import print_json, print_pairs

    found = examine()
    if args.json:
        print_json(found)
    else:
        print_pairs("halfplate doctor", [(name.replace("_", " "), _spoken(value)) for name, value in found.items()])
    return 0


def examine() -> dict[str, Any]:
    """Everything that the command prints, by name."""
    import torch

    from halfplate.version import installed_version, package_version

    facts = processor_facts()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "halfplate": package_version(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpus": cores(),
        "threads": torch.get_num_threads(),
        "cpu_features": [feature for feature in FEATURES if feature in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **_kernels(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _kernels() -> dict[str, Any]:
    from halfplate.kernels import native
    from halfplate.kernels.linear import kernels_for

    found: dict[str, Any] = {"native_kernels": native.available(), "native_isa": None, "native_reason": None}
    found |= {"native_isa": native.isa()} if native.available() else {"native_reason": native.reason()}
    return found | {"kernels_for": kernels_for()}


def _spoken(value: Any) -> Any:
    return (" ".join(value) or "none known") if isinstance(value, list) else value
