"""Checks of an untrusted model folder, before its content is used.

Sizes are compared with the files before memory is allocated. Links out of the folder are refused. No file can cause another
model to be downloaded.
"""

from __future__ import annotations

import json
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from halfplate.errors import HalfplateError

LARGEST_JSON = 64 * 2**20
ADAPTER = "adapter_config.json"
LAYER_COUNT = re.compile(r"(num|n)_(\w+_)?layers?")
MOST_LAYERS = 10_000
FEW_MODULES = 20_000
MOST_OF_ANYTHING = 2**20  # counts in a configuration other than layers: heads, experts, groups


def check_folder(name: str, folder: Path, argument: str = "model") -> None:
    """Raise HalfplateError for links that lead out of `folder`, and for an adapter, whose base model would be downloaded.

    Links in the Hub's own cache, from a snapshot to `../../blobs`, are allowed.
    """
    home = folder.resolve()
    allowed = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(_end(path).is_relative_to(place) for place in allowed):
            raise HalfplateError(
                f"{argument}={name!r}: its file {path.name!r} is a link that leads out of the folder, which Halfplate does not follow; "
                "copy the file there, or pass the folder that holds it"
            )
    if (folder / ADAPTER).exists():
        raise HalfplateError(
            f"{argument}={name!r} holds {ADAPTER}: it is an adapter, whose base model would be loaded from elsewhere; merge it into its base model first"
        )


def _end(link: Path) -> Path:
    """The target of a link; `/` if it is a loop."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        return Path("/")


def read_json_file(path: Path) -> Any:
    """The content of a JSON file; raises OSError, or ValueError if it is not a regular file, too large, too deep or not JSON."""
    status = path.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise ValueError("it is not a regular file")
    if size > LARGEST_JSON:
        raise ValueError(f"it has {size} bytes, expected at most {LARGEST_JSON}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_layers(name: str, entries: Any, argument: str = "model") -> None:
    """Raise HalfplateError if `entries`, the content of config.json, counts more layers than any model has.

    Some configuration classes make a list of that length before it can be compared with the files.
    """
    for key, value in entries.items() if isinstance(entries, dict) else ():
        if isinstance(value, dict):
            check_layers(name, value, argument)
        elif LAYER_COUNT.fullmatch(key) and isinstance(value, int) and value > MOST_LAYERS:
            raise HalfplateError(
                f"{argument}={name!r}: {key}={value} in its config.json, expected at most {MOST_LAYERS}; correct it or download it again"
            )


def check_counts(name: str, config: Any, tensors: int, elements: int, argument: str = "model") -> None:
    """Raise HalfplateError if `config`, a configuration of transformers, describes more than its files can hold.

    Every layer has its own tensor, and the embedding is stored. Other excessive numbers are found when the skeleton is compared
    with the files.

    tensors, elements: number of tensors and values in the headers of the weight files.
    """
    text = config.get_text_config()
    entries = text.to_dict()
    for key, value in entries.items():
        counts = key.startswith(("num_", "n_")) or key.endswith(("_size", "_dim", "_rank"))
        if not (counts and isinstance(value, int)):
            continue
        most = tensors if key in ("num_hidden_layers", "n_layer") else max(elements, MOST_OF_ANYTHING)
        if not -1 <= value <= most:
            raise HalfplateError(
                f"{argument}={name!r}: {key}={value} in its configuration does not fit files of {tensors} tensors with {elements} values; download it again"
            )
    vocabulary, width = entries.get("vocab_size"), entries.get("hidden_size")
    if isinstance(vocabulary, int) and isinstance(width, int) and vocabulary * width > elements:
        raise HalfplateError(
            f"{argument}={name!r}: vocab_size={vocabulary} times hidden_size={width} is more than the {elements} values of its files; download it again"
        )


def check_parameters(name: str, needed: int, room: int) -> None:
    """Raise HalfplateError if the model of the configuration has more parameters than its files can hold."""
    if needed > room:
        raise HalfplateError(
            f"model={name!r}: its configuration describes {needed} parameters, its files can hold {room}; download it again"
        )


@contextmanager
def bounded(name: str, room: int) -> Iterator[None]:
    """Context manager that raises HalfplateError as soon as a model is built with far more parameters or modules than `room` bytes can hold.

    A number in a configuration may create millions of modules, which take minutes to build before they can be counted.
    """
    from torch.nn.modules.module import (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    here, counted = threading.get_ident(), [0, 0]

    def count(value: int, kind: int, most: int) -> None:
        if threading.get_ident() == here:
            counted[kind] += value
            if counted[kind] > most:
                check_parameters(name, counted[0], room)
                raise HalfplateError(
                    f"model={name!r}: its configuration describes more than {most} modules, its files have {room} bytes; download it again"
                )

    # The head may be counted twice before it is tied, and some modules are replaced later.
    hooks = [
        register_module_parameter_registration_hook(
            lambda _module, _name, parameter: count(0 if parameter is None else parameter.numel(), 0, 4 * room)
        ),
        register_module_module_registration_hook(lambda _module, _name, _inner: count(1, 1, room + FEW_MODULES)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count_tensors(paths: Iterable[Path]) -> tuple[int, int]:
    """Number of tensors and values in safetensors files whose headers have been checked."""
    tensors = elements = 0
    for path in paths:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        tensors += len(header)
        elements += sum(prod(entry["shape"]) for entry in header.values())
    return tensors, elements
