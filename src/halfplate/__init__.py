"""One-shot compression of large language models with ARMOR, without retraining.

After `import halfplate`, `AutoModelForCausalLM.from_pretrained` of transformers loads Halfplate checkpoints. The
commands are functions here. Their modules are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError
from halfplate.registration import register

if TYPE_CHECKING:
    from halfplate.checkpoint.quantization import HalfplateConfig
    from halfplate.checkpoint.read import inspect_checkpoint as inspect
    from halfplate.checkpoint.read import load
    from halfplate.compression.compress import compress
    from halfplate.compression.pruning import prune
    from halfplate.evaluation.bench import bench
    from halfplate.evaluation.generate import generate
    from halfplate.evaluation.judge import evaluate
    from halfplate.exports import export
    from halfplate.recipe import Recipe
    from halfplate.recovery.settings import Recovery
    from halfplate.sweeps import sweep
    from halfplate.verbs import plan, recover, write_report

    __version__: str

__all__ = [
    "HalfplateConfig",
    "HalfplateError",
    "Recipe",
    "Recovery",
    "__version__",
    "bench",
    "compress",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "plan",
    "prune",
    "recover",
    "sweep",
    "write_report",
]

_FOUND_IN = {
    "HalfplateConfig": ("halfplate.checkpoint.quantization", "HalfplateConfig"),
    "Recipe": ("halfplate.recipe", "Recipe"),
    "Recovery": ("halfplate.recovery.settings", "Recovery"),
    "bench": ("halfplate.evaluation.bench", "bench"),
    "compress": ("halfplate.compression.compress", "compress"),
    "evaluate": ("halfplate.evaluation.judge", "evaluate"),
    "export": ("halfplate.exports", "export"),
    "generate": ("halfplate.evaluation.generate", "generate"),
    "inspect": ("halfplate.checkpoint.read", "inspect_checkpoint"),
    "load": ("halfplate.checkpoint.read", "load"),
    "plan": ("halfplate.verbs", "plan"),
    "prune": ("halfplate.compression.pruning", "prune"),
    "recover": ("halfplate.verbs", "recover"),
    "sweep": ("halfplate.sweeps", "sweep"),
    "write_report": ("halfplate.verbs", "write_report"),
}

register()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from halfplate.version import package_version

        return package_version()
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'halfplate' has no attribute {name!r}")
    module, attribute = _FOUND_IN[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
