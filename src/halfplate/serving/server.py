"""Starting the server of transformers behind the guard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from halfplate.checkpoint.config import METHOD
from halfplate.errors import HalfplateError
from halfplate.serving.guard import Guard
from halfplate.serving.metrics import Metrics
from halfplate.serving.settings import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Serve until the process is told to end; `transformers.utils.import_utils.is_serve_available` must hold."""
    from transformers.cli.serve import Serve

    metrics, managers = Metrics(), dict[str, Any]()
    install = _batching(settings, metrics, managers)
    with _guarded(lambda app: Guard(app, settings, metrics), install, settings.activations):
        try:
            Serve(
                force_model=settings.model,
                host=settings.host,
                port=settings.port,
                device=settings.device,
                dtype=settings.dtype,
            )
        finally:
            for manager in managers.values():
                manager.stop()


def _batching(settings: ServeSettings, metrics: Metrics, managers: dict[str, Any]) -> Callable[[Any], None]:
    """A function that makes a `GenerationState` of transformers run requests in batches. managers: filled by model."""
    if settings.max_batch == 1 and settings.prompt_cache == 0 and settings.cache_dtype == "fp32":
        return lambda state: None
    try:
        from halfplate.serving.batches import BatchManager
    # Other versions of transformers arrange their server otherwise.
    except ImportError as error:
        print(
            f"halfplate: warning: requests run one after another and without a prompt cache, because this transformers has another server ({error})",
            file=sys.stderr,
        )
        return lambda state: None

    def install(state: Any) -> None:
        plain = state.get_manager

        def get_manager(model_id: str, use_cb: bool = False) -> Any:
            if use_cb:
                return plain(model_id, use_cb=use_cb)
            if model_id not in managers:
                managers[model_id] = BatchManager(settings, metrics)
            return managers[model_id]

        state.get_manager = get_manager

    return install


def _take_activations(manager: Any, activations: str) -> None:
    """Make a `ModelManager` of transformers pack each compressed model that it loads again, for these activations."""
    if activations == "auto":
        return  # as `from_pretrained` has packed it
    from halfplate.runtime.prepare import accelerate, restore

    plain = manager._load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        model = plain(*args, **kwargs)
        if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) == METHOD:
            restore(model)
            accelerate(model, activations)
        return model

    manager._load_model = load_model


@contextmanager
def _guarded(wrap: Callable[[Any], Any], install: Callable[[Any], None], activations: str = "auto") -> Iterator[None]:
    """Context manager in which transformers' server is built behind `wrap`, with `install` carried out on its state.

    activations: of the compressed models that it loads.
    """
    try:
        from transformers.cli.serving import server
    except ImportError:
        raise HalfplateError("serve needs the server of transformers 5.24; run `pip install -U transformers`") from None

    plain = server.build_server

    def build(*args: Any, **kwargs: Any) -> Any:
        _take_activations(args[0] if args else kwargs["model_manager"], activations)
        if "generation_state" in kwargs:
            install(kwargs["generation_state"])
        return wrap(plain(*args, **kwargs))

    server.build_server = build
    try:
        yield
    finally:
        server.build_server = plain
