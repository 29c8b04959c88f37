"""Opening an original model: a Hugging Face folder, a `.gguf` file or a Hub id, checked before anything is loaded."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfplate.arguments import check_name
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.models import gguf
from halfplate.models.auto import auto_class, needed_inputs
from halfplate.models.configuration import (
    METHOD,
    check_causal,
    check_kind,
    check_plain,
    check_saves,
    quantisation_of,
    read_config,
    read_entries,
    read_generation_config,
)
from halfplate.models.conv1d import as_linears, transposed_weights
from halfplate.models.experts import linear_experts
from halfplate.models.fit import check_fit, further_tensors, stored_apart
from halfplate.models.quantised_folders import decoded_tensors
from halfplate.models.reading import reading
from halfplate.models.trust import bounded, check_counts, check_folder, check_parameters, count_tensors, read_json_file
from halfplate.models.weight_files import find_weight_files, sampled_sha256, usual_dtype
from halfplate.storage.tensor_file import NAMES, StoredTensor, read_tensor

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The files that a model needs, never pickles. Folders inside a repository hold other formats of the model.
HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*_tokens*.json",
    "*.model",
    "chat_template*",
    "README.md",
)
VALUES_IN_A_BYTE = 4  # of GGUF types and of codes, at most; fewer bits per value do not occur
CORRECT = "correct it or download the model again"
HUB_IGNORED = ("*/*", "consolidated*")


@dataclass(frozen=True)
class Source:
    """An original model that has been checked but not loaded.

    name: as the user gave it.
    kind: `folder`, `gguf` or `hub`.
    path: the local folder or `.gguf` file.
    config: the configuration, adapted to the stored tensors; `notes` list the differences from config.json.
    nbytes: bytes of the weight files.
    other_dtype: element type in which uncompressed tensors are stored: that of the source (bf16 for GGUF).
    gguf_header: only for GGUF files.
    tensors: location of each tensor by its name in the files, or in a plain model if the files hold codes; empty for GGUF.
    notes: one sentence for each entry of the configuration and each tensor that is ignored.
    further: tensors that predict further tokens, which are copied as they are; the model does not have them.
    in_model_form: names and layout of the tensors are those of the model, because a transform wrote them.
    quantised: the method that another tool quantised it with; None for a model of plain weights.
    """

    name: str
    kind: str
    path: Path
    config: "PretrainedConfig"
    weight_files: tuple[Path, ...]
    nbytes: int
    other_dtype: torch.dtype
    gguf_header: gguf.GgufHeader | None = None
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    further: Mapping[str, StoredTensor] = field(default_factory=dict)
    in_model_form: bool = False
    quantised: str | None = None

    def identity(self) -> dict[str, Any]:
        """The identity of a model, without reading it completely: the configuration, the weight files and some bytes of every tensor."""
        return {
            "config": self.config.to_dict(),
            "weights": [[path.name, path.stat().st_size] for path in self.weight_files],
            "sampled_sha256": sampled_sha256(self.weight_files, self.tensors.values()),
        }

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class LoadedModel:
    """An original model in fp32 and eval mode, with its tokenizer and its source."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: Source


def open_source(name: str) -> Source:
    """Open and check a model. name: a local folder, a `.gguf` file, or a Hub id (the only case that uses the network).

    Raises HalfplateError unless it is a decoder-only language model in complete safetensors or GGUF files, of plain weights or of codes that
    `quantised_folders` reads.
    """
    if not name.strip():
        raise HalfplateError(f"model={name!r} is empty; pass a local folder, a .gguf file, or a Hub id")
    path = Path(name).expanduser()
    check_name("model", path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise HalfplateError(
                f"model={name!r} is a file but not a .gguf file; pass the folder that holds config.json, or a .gguf file"
            )
        return _open_gguf(name, path)
    if path.is_dir():
        return _open_folder(name, "folder", path)
    return _open_folder(name, "hub", _download(name))


def skeleton(source: Source, buffers: bool = False, joined: bool = False) -> "PreTrainedModel":
    """The model on the meta device: names and shapes of all tensors, without values. Experts are linears (halfplate.models.experts).

    buffers: give values to computed buffers, such as the frequencies of rotary embeddings.
    joined: keep experts in 3-D tensors, as transformers holds them.
    Raises HalfplateError if transformers cannot build the model, or if it is larger than its files.
    """
    from accelerate import init_empty_weights

    what = f"transformers cannot build a {source.config.model_type} model from its configuration"
    plain = source.gguf_header is None and source.quantised is None
    room = source.nbytes * (1 if plain else VALUES_IN_A_BYTE)
    place = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    # A copy, because building a model changes its configuration.
    with reading(source.name, what, CORRECT, source.config.to_dict()), bounded(source.name, room), place:
        model: Any = auto_class(source.config).from_config(deepcopy(source.config), dtype=torch.float32)
    as_linears(model)
    empty: PreTrainedModel = model.eval().requires_grad_(False)
    check_parameters(source.name, sum(parameter.numel() for parameter in empty.parameters()), room)
    if source.gguf_header is None and empty.can_generate():
        empty.generation_config = read_generation_config(source.name, source.path) or empty.generation_config
    if not joined:
        linear_experts(empty)
    return empty


@plain_defaults()
def load_dense(model: str | Source, device: str = "cpu") -> LoadedModel:
    """Load a model (by name or as an open Source) with its tokenizer, in fp32, in eval mode and without gradients.

    Raises HalfplateError as `open_source` does, for tensors missing from the files, and for NaN or inf.
    """
    source = open_source(model) if isinstance(model, str) else model
    assert not source.in_model_form, "its files are those of the model before its transforms: use StreamedModel"
    name = source.name
    skeleton(source)  # refuses models that are larger than their files before allocating memory
    if source.gguf_header is not None:
        loaded, report = gguf.load_model(source.path, name, source.config)
    else:
        loaded, report = _load_folder(source)
    for note in source.notes:
        warnings.warn(f"model={name!r}: {note}", stacklevel=2)
    tokenizer = load_tokenizer(source)
    _check_complete(name, report)
    _check_finite(name, loaded)
    try:
        torch.nn.Module.to(loaded, device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise HalfplateError(f"device={device!r} cannot hold the model: {reason}; try device='cpu'") from None
    return LoadedModel(loaded.eval().requires_grad_(False), tokenizer, source)


def load_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model; raises HalfplateError if none loads."""
    if source.gguf_header is not None:
        return gguf.load_tokenizer(source.path, source.name)
    return _load_tokenizer(source)


def is_compressed(path: str | Path) -> bool:
    """Whether `path` is a folder whose config.json says that Halfplate compressed it."""
    config = Path(path) / "config.json"
    try:
        entry = read_json_file(config).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


def _download(name: str) -> Path:
    if not HUB_ID.fullmatch(name):
        raise HalfplateError(
            f"model={name!r} does not exist; expected a local folder, a .gguf file, or a Hub id such as org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED)))
    # The Hub client raises exceptions of several libraries (HTTP, cache, authorisation); all mean that there is no model.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise HalfplateError(
            f"model={name!r} does not exist here and could not be fetched from the Hub ({reason}); "
            "check the path or the id and the network, or pass a local folder or .gguf file"
        ) from None


def _open_gguf(name: str, path: Path) -> Source:
    header = gguf.read_header(path, name)
    config = gguf.read_config(path, name)
    check_causal(name, config)
    check_counts(name, config, header.contents.tensors, header.contents.elements)
    return Source(name, "gguf", path, config, (path,), path.stat().st_size, torch.bfloat16, header)


def _open_folder(name: str, kind: str, path: Path) -> Source:
    check_folder(name, path)
    entries = read_entries(name, path)
    check_kind(name, entries)
    config, notes = read_config(name, path, entries)
    # Absolute, because tasks run in processes with other working directories.
    weights = find_weight_files(name, path.absolute())
    with reading(name, "its weights cannot be read", "download the model again", entries):
        quantised = decoded_tensors(name, entries, weights.tensors)
    tensors = weights.tensors if quantised is None else quantised.tensors
    check_plain(name, entries, tensors)
    with reading(name, "config.json cannot be used", "correct it or download it again", entries):
        counts = count_tensors(weights.paths)
        if quantised is not None:
            counts = len(tensors), sum(prod(stored.shape) for stored in tensors.values())
        check_counts(name, config, *counts)
    method, dtype = quantisation_of(entries), usual_dtype(name, tensors)
    if quantised is not None:
        notes = (*notes, quantised.note)
    elif method is not None:
        notes = (
            *notes,
            f"config.json says that the weights are quantised ({method!r}), but the files hold plain weights; the entry is left out",
        )
    source = Source(name, kind, path, config, weights.paths, weights.nbytes, dtype, tensors=tensors, notes=notes)
    return _fitted(source if quantised is None else replace(source, quantised=method), entries)


def _fitted(source: Source, entries: dict[str, Any]) -> Source:
    """`source` with the configuration adapted to its tensors; raises HalfplateError if they do not match.

    It finds everything that would fail later: models that cannot be built or saved, and tensors that are missing or would be dropped.
    """
    name, notes = source.name, list(source.notes)
    model = skeleton(source)
    if source.quantised is not None and (transposed := sorted(transposed_weights(model))):
        raise HalfplateError(
            f"model={name!r}: {source.quantised} of a model with transposed weights ({transposed[0]}) is not read; pass the fp32, bf16 or fp16 model it was made from"
        )
    apart = stored_apart(model, source.tensors)
    if apart:
        config = deepcopy(source.config)
        config.tie_word_embeddings = False
        source = replace(source, config=config)
        model = skeleton(source)
        if model.all_tied_weights_keys:
            target, origin = apart[0]
            raise HalfplateError(
                f"model={name!r}: its files hold {target} and {origin} with different values, and {type(model).__name__} shares "
                "them; download the model again"
            )
        notes.append(
            f"config.json: tie_word_embeddings is taken as false, because the files hold {apart[0][0]} and {apart[0][1]} with different values"
        )
    notes += check_fit(name, model, source.tensors)
    check_saves(name, model.config, entries)
    if needed := needed_inputs(model):
        raise HalfplateError(
            f"model={name!r}: {type(model).__name__} does not run on a text alone (it needs {', '.join(needed)}), so its language model cannot be "
            "compressed; pass a model that continues a text"
        )
    # Codes are copied as floats of the type that all else has.
    kind = NAMES[source.other_dtype]
    further = {
        stored: tensor if (tensor := source.tensors[stored]).encoded is None else replace(tensor, kind=kind)
        for stored in further_tensors(model, source.tensors)
    }
    return replace(source, notes=tuple(notes), further=further)


class _Read:
    """A stored tensor that transformers reads when it needs it, as it does with slices of safetensors files."""

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    def __getitem__(self, place: Any) -> "Tensor":
        return read_tensor(self._stored)[place]


def _load_folder(source: Source) -> "tuple[PreTrainedModel, dict[str, Any]]":
    loader: Any = auto_class(source.config)
    place: dict[str, Any] = {"pretrained_model_name_or_path": source.path}
    if source.quantised is not None:
        # transformers would need the package of the other tool, and would keep the codes.
        empty = skeleton(source, joined=True)
        loader, state = type(empty), {name: _Read(stored) for name, stored in source.tensors.items()}
        place = {"pretrained_model_name_or_path": None, "state_dict": state}
    with reading(source.name, "its weights do not fit its config.json", "download the model again"):
        model, report = loader.from_pretrained(
            **place,
            config=deepcopy(source.config),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, the error that it would raise does not
        )
    if source.quantised is not None:
        model.generation_config = empty.generation_config
    return model, report


def _load_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    cure = "put tokenizer.json and tokenizer_config.json beside config.json"
    with reading(source.name, "it has no tokenizer that loads", cure):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=False, local_files_only=True
        )
    return tokenizer


def _check_complete(name: str, report: dict[str, Any]) -> None:
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise HalfplateError(
            f"model={name!r}: {key} has shape {tuple(stored)} in its file, config.json asks for {tuple(expected)}; "
            "download the model again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise HalfplateError(
            f"model={name!r}: its files lack {len(missing)} tensors of its config.json ({missing[0]}, ...), "
            "which would be random; download the model again"
        )


def _check_finite(name: str, model: "PreTrainedModel") -> None:
    for key, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            nan, inf = int(parameter.isnan().sum()), int(parameter.isinf().sum())
            raise HalfplateError(
                f"model={name!r}: {key} holds {nan} NaN and {inf} inf among {parameter.numel()} values, expected finite weights; "
                "download the model again"
            )
