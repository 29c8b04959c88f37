"""Making Halfplate known to transformers, in whichever order the two are imported, without importing transformers."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _AfterImport:
    """A finder that finds nothing itself: it adds the registration to the end of the import of `TARGET`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register the quantizer with transformers now, or as soon as transformers is imported.

    Calling it again (`importlib.reload(halfplate)`) changes nothing.
    """
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    # Where the import of the quantizer is what imports transformers, it is half done here and registers when it ends.
    import_module("halfplate.checkpoint.quantizer")
