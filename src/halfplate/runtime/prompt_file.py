"""A text with its keys and values in a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.errors import HalfplateError
from halfplate.runtime.architectures import architecture_of, config_of
from halfplate.runtime.cache import GrowingCache
from halfplate.runtime.kept import CACHE_DTYPES, Kept
from halfplate.runtime.prompts import Prompt, why_no_prompts
from halfplate.runtime.traits import traits_of
from halfplate.storage.atomic import whole_file
from halfplate.storage.tensor_file import DamagedFile, read_header, read_metadata, read_tensor, write_file

VERSION = 1
RECORD = "halfplate prompt"  # name of the entry of the metadata
_KINDS = ("I64", "F32", "BF16", "I8")  # types of its tensors
READ = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # types in which a model computes
SAMPLE = 4096  # bytes at the beginning, in the middle and at the end of a tensor that its fingerprint reads
IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # of a configuration


def model_fingerprint(model: Any) -> str:
    """Hexadecimal SHA-256 of the configuration of a model and of the names, sizes and samples of the bytes of its tensors.

    Models whose weights differ only outside the samples have the same.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in IGNORED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(str(model.dtype).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in _samples(tensor.detach()):
            digest.update(piece)
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Iterator[bytes]:
    if tensor.numel() == 0:
        return
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in (0, len(flat) // 2, len(flat) - SAMPLE):
        yield bytes(flat[max(0, start) : max(0, start) + SAMPLE].cpu().numpy())


class PromptFile:
    """The text in a file, for prompts that begin like it, until a later one takes its place.

    dtype: of the keys and values of this run.
    Raises HalfplateError for a model whose keys and values cannot be used again, and as `read_prompt` does.
    """

    def __init__(self, model: Any, path: str | Path, dtype: torch.dtype) -> None:
        reason = why_no_prompts(model)
        if reason is not None:
            raise HalfplateError(f"--prompt-cache cannot be used with this model: {reason}; leave it out")
        self._path, self._fingerprint = Path(path), model_fingerprint(model)
        self.prompt = self._stored = read_prompt(self._path, model, self._fingerprint)
        if self.prompt is not None and self.prompt.layers[0][0].numbers.dtype != dtype:
            kept = next(name for name, kind in CACHE_DTYPES.items() if kind == self.prompt.layers[0][0].numbers.dtype)
            raise _refused(self._path, f"holds keys and values in {kept}, and another --cache-dtype was asked for")

    def keep(self, cache: GrowingCache, ids: Tensor) -> None:
        """Hold the first positions of `cache`, those of the prompt `ids`, int64 (tokens,)."""
        self.prompt = Prompt.of(cache, ids)

    def write(self) -> None:
        """Write the last prompt, unless the file begins with it."""
        last, stored = self.prompt, self._stored
        if last is not None and (stored is None or stored.shared(last.tokens) < len(last.tokens)):
            write_prompt(self._path, last, self._fingerprint)


def write_prompt(path: Path, prompt: Prompt, fingerprint: str) -> None:
    """Write a text with its keys and values; raises HalfplateError if the file cannot be written."""
    tensors = {"tokens": prompt.tokens}
    for number, pair in enumerate(prompt.layers):
        for name, kept in zip(("keys", "values"), pair, strict=True):
            tensors[f"{number}.{name}"] = kept.numbers
            if kept.scales is not None:
                tensors[f"{number}.{name}.scales"] = kept.scales
    dtype = next(name for name, kind in READ.items() if kind == prompt.dtype)
    record = {"version": VERSION, "model": fingerprint, "tokens": _digest(prompt.tokens), "dtype": dtype}
    try:
        with whole_file(path) as partial:
            write_file(partial, tensors, durable=False, metadata={RECORD: json.dumps(record)})
    except OSError as error:
        raise HalfplateError(f"--prompt-cache {str(path)!r} cannot be written: {error}") from error


def read_prompt(path: Path, model: Any, fingerprint: str) -> Prompt | None:
    """The text in the file, or None if there is no file.

    Raises HalfplateError if it is not one of this model, or damaged. Values are not checked: whoever can write the file chooses the text that follows.
    """
    try:
        if not path.exists():
            return None
        found = read_header(path)
        record = _record(path)
        if record.get("version") != VERSION:
            raise _refused(
                path, f"is of version {record.get('version')!r}, and this halfplate writes version {VERSION}"
            )
        if record.get("model") != fingerprint:
            raise _refused(path, "is of another model, or of other options of it")
        tensors = {name: read_tensor(stored) for name, stored in found.items() if stored.kind in _KINDS}
    except DamagedFile as error:
        raise _refused(path, f"cannot be read: {error.reason}") from error
    except OSError as error:
        raise _refused(path, f"cannot be read: {error}") from error
    tokens = tensors.get("tokens")
    if tokens is None or tokens.ndim != 1 or tokens.dtype != torch.int64 or record.get("tokens") != _digest(tokens):
        raise _refused(path, "is damaged: its tokens are not those of its record")
    if record.get("dtype") not in READ:
        raise _refused(path, f"is damaged: its model computes in {record.get('dtype')!r}")
    layers = tuple(_layers(path, tensors, config_of(model).num_hidden_layers))
    prompt = Prompt(tokens, layers, READ[record["dtype"]])
    _check_shapes(path, prompt, model)
    return prompt


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_metadata(path)[RECORD])
    except (KeyError, TypeError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise _refused(path, "is not a prompt cache")
    return record


def _layers(path: Path, tensors: dict[str, Tensor], count: int) -> Iterator[tuple[Kept, Kept]]:
    for number in range(count):
        pair = []
        for name in (f"{number}.keys", f"{number}.values"):
            if name not in tensors:
                raise _refused(path, f"is damaged: it has no {name}")
            pair.append(Kept(tensors[name], tensors.get(f"{name}.scales")))
        yield pair[0], pair[1]


def _check_shapes(path: Path, prompt: Prompt, model: Any) -> None:
    """Raise HalfplateError unless every layer has the heads of the model, the length of the text and the type of the first."""
    architecture = architecture_of(model)
    traits: Any = traits_of(model, architecture)  # type: ignore[arg-type]
    shape = (1, traits.kv_heads, len(prompt.tokens), traits.head_dim)
    dtype = prompt.layers[0][0].numbers.dtype
    for number, pair in enumerate(prompt.layers):
        for kept in pair:
            numbers, scales = kept.numbers, kept.scales
            scaled = scales is not None and (tuple(scales.shape), scales.dtype) == (shape[:3], torch.float32)
            right = scaled if dtype == torch.int8 else scales is None
            if (
                dtype not in CACHE_DTYPES.values()
                or (tuple(numbers.shape), numbers.dtype) != (shape, dtype)
                or not right
            ):
                raise _refused(
                    path, f"is damaged: layer {number} has {numbers.dtype} {tuple(numbers.shape)}, expected {shape}"
                )


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def _refused(path: Path, reason: str) -> HalfplateError:
    return HalfplateError(f"--prompt-cache {str(path)!r} {reason}; give another file, or delete this one")
