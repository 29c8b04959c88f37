"""Registering Halfplate with transformers and lm-eval, in any import order, without importing them."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _AfterImport:
    """An import finder that finds nothing itself, but runs `action` after the module `target` has been imported."""

    def __init__(self, target: str, action: Callable[[], None]) -> None:
        self.target, self.action = target, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute, action = spec.loader.exec_module, self.action

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the quantizer with transformers and the model type `halfplate` with lm-eval, now or as soon as they are imported.

    Calling it again (`importlib.reload(halfplate)`) changes nothing.
    """
    for target, action in (
        ("transformers.quantizers.auto", _register_quantizer),
        ("lm_eval.api.registry", _register_lm_eval_model),
    ):
        if target in sys.modules:
            action()
        elif not any(getattr(finder, "target", None) == target for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(target, action))


def _register_quantizer() -> None:
    # If importing the quantizer imports transformers, its import is not complete here; the quantizer registers at its end.
    import_module("halfplate.integrations.quantizer")


def _register_lm_eval_model() -> None:
    registry = sys.modules["lm_eval.api.registry"].model_registry
    if "halfplate" not in registry:
        registry.register("halfplate", target="halfplate.evaluation.harness:HalfplateLM")
