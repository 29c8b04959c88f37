"""Reading and writing the JSON files of a checkpoint (docs/format.md)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from halfplate.arguments import check_name
from halfplate.dtypes import STORED
from halfplate.errors import HalfplateError
from halfplate.formats.needs import LINEAR_EXPERTS, check_known, needs_of
from halfplate.formats.sharing import check_shared
from halfplate.formats.spec import WeightSpec
from halfplate.models.trust import read_json_file
from halfplate.version import package_version

METHOD = "halfplate"
VERSION = 1  # of `quantization_config`
RECORD_VERSION = 1  # of `halfplate.json`
CONFIG_FILE = "config.json"
RECORD_FILE = "halfplate.json"

# transformers takes this for the name of a weight file and raises an error with it; HalfplateQuantizer removes it.
SENTENCE = "this checkpoint holds Halfplate compressed weights; run `pip install halfplate` and `import halfplate` before from_pretrained"


def quantization_config(specs: Mapping[str, WeightSpec], linear_experts: bool = False) -> dict[str, Any]:
    """The `quantization_config` of a model whose modules are compressed as `specs` says.

    linear_experts: experts are stored as linears, compressed or not, and not in the 3-D tensors of transformers.
    """
    needs = needs_of(specs.values(), (LINEAR_EXPERTS,) if linear_experts else ())
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "modules": {name: spec.to_json() for name, spec in specs.items()},
    } | ({"needs": needs} if needs else {})


def parse_modules(version: Any, modules: Any, needs: Any = None) -> dict[str, WeightSpec]:
    """The specifications in a `quantization_config`, by module name; raises HalfplateError for any that is invalid.

    needs: what a reader must support (halfplate.formats.needs), if given; `halfplate` is the lowest version that reads the checkpoint.
    """
    if type(version) is not int or version < 1:
        raise HalfplateError(
            f"quantization_config.version={version!r} must be a positive integer; the checkpoint is damaged, write it again"
        )
    if version > VERSION:
        least = needs.get("halfplate") if isinstance(needs, dict) else None
        raise HalfplateError(
            f"quantization_config.version={version} is newer than halfplate {package_version()} supports ({VERSION}); "
            f"upgrade halfplate{f' to {least} or later' if least else ''}"
        )
    if needs is not None:
        check_known(needs)
    if not isinstance(modules, dict):
        raise HalfplateError(
            f"quantization_config.modules is of type {type(modules).__name__}, expected an object of module names; "
            "the checkpoint is damaged, write it again"
        )
    specs = {name: WeightSpec.from_json(entry, name) for name, entry in modules.items()}
    check_shared(specs)
    return specs


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; raises HalfplateError if there is none."""
    try:
        content = read_json_file(path)
    except FileNotFoundError:
        raise HalfplateError(f"{str(path)!r} does not exist; give the folder of a Halfplate checkpoint") from None
    except (OSError, ValueError) as error:
        raise HalfplateError(
            f"{str(path)!r} cannot be read as JSON: {error}; copy or write the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise HalfplateError(
            f"{str(path)!r} holds a JSON {type(content).__name__}, expected an object; copy or write the checkpoint again"
        )
    return content


def read_specs(folder: Path) -> dict[str, WeightSpec]:
    """The specifications of the compressed modules of a checkpoint; raises HalfplateError if `folder` is not a checkpoint."""
    check_name("path", folder)
    if not folder.is_dir():
        raise HalfplateError(f"path={str(folder)!r} is not a folder; give the folder of a Halfplate checkpoint")
    quantization = read_json(folder / CONFIG_FILE).get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    method = quantization.get("quant_method")
    if method != METHOD:
        raise HalfplateError(
            f"path={str(folder)!r} is not a Halfplate checkpoint: quantization_config.quant_method in its config.json is {method!r}, expected {METHOD!r}"
        )
    return parse_modules(quantization.get("version"), quantization.get("modules"), quantization.get("needs"))


def pruning_of(folder: Path) -> dict[str, Any] | None:
    """What `halfplate prune` recorded in `folder`, or in the model that the checkpoint there was made from; None without it."""
    try:
        found = read_record(folder).get("pruned")
    except HalfplateError:
        return None
    return found if isinstance(found, dict) else None


def other_dtype(folder: Path) -> torch.dtype:
    """The element type of the uncompressed tensors of a checkpoint; raises HalfplateError if it is not given."""
    named = read_json(folder / CONFIG_FILE).get("dtype")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in STORED.values()}
    if named not in dtypes:
        raise HalfplateError(f"dtype={named!r} in {str(folder / CONFIG_FILE)!r} is not one of {', '.join(dtypes)}")
    return dtypes[named]


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `halfplate.json` of a checkpoint; raises HalfplateError if it is missing, damaged or too new."""
    record = read_json(folder / RECORD_FILE)
    version = record.get("format_version")
    if type(version) is not int or version < 1:
        raise HalfplateError(
            f"format_version={version!r} in {str(folder / RECORD_FILE)!r} must be a positive integer; write the checkpoint again"
        )
    if version > RECORD_VERSION:
        raise HalfplateError(
            f"format_version={version} in {str(folder / RECORD_FILE)!r} is newer than this halfplate supports ({RECORD_VERSION}); upgrade halfplate"
        )
    return record
