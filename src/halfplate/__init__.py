"""One-shot N:M compression of large language models with ARMOR: half the size, least loss, no retraining.

After `import halfplate`, `AutoModelForCausalLM.from_pretrained` of transformers loads Halfplate checkpoints. The verbs
of the command line are functions here; their modules are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError
from halfplate.registration import register

if TYPE_CHECKING:
    from halfplate.checkpoint.export import export_dense as export
    from halfplate.checkpoint.quantizer import HalfplateConfig
    from halfplate.checkpoint.read import load
    from halfplate.evaluation.bench import bench
    from halfplate.evaluation.perplexity import evaluate
    from halfplate.execution.local import compress
    from halfplate.execution.recover import recover
    from halfplate.planning import make_plan as plan

    __version__: str

__all__ = [
    "HalfplateConfig",
    "HalfplateError",
    "__version__",
    "bench",
    "compress",
    "evaluate",
    "export",
    "load",
    "plan",
    "recover",
    "report",
]

_LAZY = {
    "HalfplateConfig": ("halfplate.checkpoint.quantizer", "HalfplateConfig"),
    "bench": ("halfplate.evaluation.bench", "bench"),
    "compress": ("halfplate.execution.local", "compress"),
    "evaluate": ("halfplate.evaluation.perplexity", "evaluate"),
    "export": ("halfplate.checkpoint.export", "export_dense"),
    "load": ("halfplate.checkpoint.read", "load"),
    "plan": ("halfplate.planning", "make_plan"),
    "recover": ("halfplate.execution.recover", "recover"),
}

register()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from halfplate.version import package_version

        return package_version()
    if name not in _LAZY:
        raise AttributeError(f"module 'halfplate' has no attribute {name!r}")
    module, function = _LAZY[name]
    return getattr(import_module(module), function)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
