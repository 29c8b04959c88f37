"""Where a dense model comes from: a Hugging Face folder, a `.gguf` file or a Hub id, checked before anything heavy loads."""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.models import gguf
from halfplate.models.trust import check_counts, check_folder, check_parameters, count_tensors, read_json_file
from halfplate.models.weight_files import WeightFiles, find_weight_files, sampled_sha256
from halfplate.tensor_file import StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Everything a model folder needs, and never a pickle; folders inside a repository hold other formats of the same model.
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
HUB_IGNORED = ("*/*", "consolidated*")


@dataclass(frozen=True)
class Source:
    """A dense model that has been checked but not loaded.

    name: as the user gave it. kind: `folder`, `gguf` or `hub`. path: the local folder or `.gguf` file.
    nbytes: bytes of the weight files. other_dtype: element type in which tensors that stay dense are stored, the
    source's own (bf16 for GGUF). gguf_header: set for GGUF files alone. tensors: where each tensor lies, by its name in the
    files; empty for GGUF.
    """

    name: str
    kind: str
    path: Path
    config: "PretrainedConfig"
    weight_files: tuple[Path, ...]
    nbytes: int
    other_dtype: torch.dtype
    gguf_header: gguf.GgufHeader | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What tells two models apart without reading them whole: the configuration, the weight files and some bytes of every tensor."""
        return {
            "config": self.config.to_dict(),
            "weights": [[path.name, path.stat().st_size] for path in self.weight_files],
            "sampled_sha256": sampled_sha256(self.weight_files, self.tensors.values()),
        }


@dataclass
class LoadedModel:
    """A dense model in fp32 and eval mode, its tokenizer, and where both came from."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: Source


def open_source(name: str) -> Source:
    """Resolve and check `name`: a local folder, a `.gguf` file, or a Hub id (the only case that uses the network).

    Raises HalfplateError for anything but a dense decoder-only language model in whole safetensors or GGUF files.
    """
    if not name.strip():
        raise HalfplateError(f"model={name!r} is empty; pass a local folder, a .gguf file, or a Hub id")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise HalfplateError(
                f"model={name!r} is a file but not a .gguf file; pass the folder that holds config.json, or a .gguf file"
            )
        return _open_gguf(name, path)
    if path.is_dir():
        return _open_folder(name, "folder", path)
    return _open_folder(name, "hub", _download(name))


def skeleton(source: Source, buffers: bool = False) -> "PreTrainedModel":
    """The model on the meta device: names and shapes of all tensors, and no values.

    buffers: those that are computed and not stored, such as the frequencies of rotary embeddings, have their values.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # A copy, because making a model completes its configuration.
    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(deepcopy(source.config), dtype=torch.float32)
    empty: PreTrainedModel = model.eval().requires_grad_(False)
    # A value of a GGUF file may be less than a bit wide only on average; none is below two bits today.
    room = source.nbytes * (4 if source.gguf_header is not None else 1)
    check_parameters(source.name, sum(parameter.numel() for parameter in empty.parameters()), room)
    _load_generation_config(source, empty)
    return empty


def _load_generation_config(source: Source, model: "PreTrainedModel") -> None:
    from transformers import GenerationConfig

    if source.gguf_header is None and (source.path / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(source.path, local_files_only=True)


@plain_defaults()
def load_dense(model: str | Source, device: str = "cpu") -> LoadedModel:
    """Load a model, by its name or as it was opened, in fp32, in eval mode and without gradients, with its tokenizer.

    Raises HalfplateError for what `open_source` refuses, for tensors missing from the files, and for NaN or inf.
    """
    source = open_source(model) if isinstance(model, str) else model
    name = source.name
    skeleton(source)  # refuses what is larger than its files before anything is allocated
    if source.gguf_header is not None:
        loaded, report = gguf.load_model(source.path, name, source.config)
    else:
        loaded, report = _load_folder(source)
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
    """The tokenizer of the model; raises HalfplateError where none loads."""
    if source.gguf_header is not None:
        return gguf.load_tokenizer(source.path, source.name, source.gguf_header)
    return _load_tokenizer(source)


def is_compressed(path: str | Path) -> bool:
    """Whether `path` is a folder whose config.json says that Halfplate compressed it."""
    config = Path(path) / "config.json"
    try:
        entry = read_json_file(config).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == "halfplate"


def _download(name: str) -> Path:
    if not HUB_ID.fullmatch(name):
        raise HalfplateError(
            f"model={name!r} does not exist; expected a local folder, a .gguf file, or a Hub id such as org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED)))
    # The Hub client raises errors of several libraries (HTTP, cache, authorisation); each means that there is no model.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise HalfplateError(
            f"model={name!r} does not exist here and could not be fetched from the Hub ({reason}); "
            "check the path or the id and the network, or pass a local folder or .gguf file"
        ) from None


def _open_gguf(name: str, path: Path) -> Source:
    header = gguf.read_header(path, name)
    config = gguf.read_config(path, name)
    _check_causal(name, config)
    check_counts(name, config, header.contents.tensors, header.contents.elements)
    return Source(name, "gguf", path, config, (path,), path.stat().st_size, torch.bfloat16, header)


def _open_folder(name: str, kind: str, path: Path) -> Source:
    check_folder(name, path)
    entries = _read_config_json(name, path)
    _check_dense(name, path, entries)
    _check_text_only(name, entries)
    config = _read_config(name, path, entries)
    _check_causal(name, config)
    # Absolute: tasks read them in processes of other working directories.
    weights: WeightFiles = find_weight_files(name, path.absolute())
    check_counts(name, config, *count_tensors(weights.paths))
    return Source(name, kind, path, config, weights.paths, weights.nbytes, weights.dtype, tensors=weights.tensors)


def _read_config_json(name: str, path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise HalfplateError(
            f"model={name!r} has no config.json; pass the folder that holds config.json and the weights"
        )
    try:
        entries = read_json_file(file)
    except (OSError, ValueError) as error:
        raise HalfplateError(f"model={name!r}: config.json is not valid JSON ({error}); download it again") from None
    if not isinstance(entries, dict):
        raise HalfplateError(
            f"model={name!r}: config.json holds a {type(entries).__name__}, expected an object; download it again"
        )
    return entries


def _check_dense(name: str, path: Path, entries: dict[str, Any]) -> None:
    if is_compressed(path):
        raise HalfplateError(
            f"model={name!r} is already compressed by Halfplate; pass the dense model it was made from"
        )
    # compressed-tensors wrote `compression_config` before transformers settled on one name.
    quantisation = entries.get("quantization_config") or entries.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise HalfplateError(
            f"model={name!r} is already quantised (quant_method {method!r}); Halfplate compresses dense weights: "
            "pass the fp32, bf16 or fp16 model it was made from"
        )


def _check_text_only(name: str, entries: dict[str, Any]) -> None:
    wrapped = [key for key in ("text_config", "vision_config", "audio_config") if entries.get(key)]
    if wrapped:
        raise HalfplateError(
            f"model={name!r} is {_architecture(entries)}, a multimodal wrapper ({', '.join(wrapped)} in config.json); "
            "expected a text-only *ForCausalLM: save its language model on its own and pass that folder"
        )


def _read_config(name: str, path: Path, entries: dict[str, Any]) -> "PretrainedConfig":
    import transformers
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    # A config is data of any shape, and each model class checks it with errors of its own.
    except Exception as error:
        kind = entries.get("model_type")
        if kind in transformers.CONFIG_MAPPING:
            reason = str(error).strip().replace("\n", " ")
            raise HalfplateError(
                f"model={name!r}: config.json cannot be read as {kind!r} ({reason}); correct it or download it again"
            ) from None
        if entries.get("auto_map"):
            raise HalfplateError(
                f"model={name!r} (model_type {kind!r}) needs Python code of its own (auto_map in config.json), which "
                "Halfplate never runs; pass a model that the transformers library has built in"
            ) from None
        raise HalfplateError(
            f"model={name!r} has model_type {kind!r}, which transformers {transformers.__version__} does not know; "
            "upgrade transformers or pass a model that it has built in"
        ) from None
    return config


def _check_causal(name: str, config: "PretrainedConfig") -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    stated = list(getattr(config, "architectures", None) or ())
    # GPT-2 and others of its age are called LMHeadModel; a file without a statement is taken as what its type maps to.
    named = not stated or any(one.endswith("ForCausalLM") or one == getattr(known, "__name__", None) for one in stated)
    if known is None or not named or getattr(config, "is_encoder_decoder", False):
        raise HalfplateError(
            f"model={name!r} is {', '.join(stated) or config.model_type}, not a causal language model; "
            "expected a decoder-only *ForCausalLM such as LlamaForCausalLM"
        )


def _architecture(entries: dict[str, Any]) -> str:
    stated = entries.get("architectures")
    return ", ".join(map(str, stated)) if isinstance(stated, list) and stated else str(entries.get("model_type"))


def _load_folder(source: Source) -> "tuple[PreTrainedModel, dict[str, Any]]":
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            source.path,
            config=source.config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, the error that it would raise does not
        )
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise HalfplateError(
            f"model={source.name!r}: its weights do not fit its config.json ({reason}); download the model again"
        ) from None
    return model, report


def _load_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=False, local_files_only=True
        )
    # Tokenizers are built by several libraries, each with errors of its own.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise HalfplateError(
            f"model={source.name!r} has no tokenizer that loads ({reason}); put tokenizer.json and tokenizer_config.json beside config.json"
        ) from None
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
            f"model={name!r}: its files lack {len(missing)} tensors that its config.json asks for ({missing[0]}, ...); "
            "they would be random: download the model again"
        )


def _check_finite(name: str, model: "PreTrainedModel") -> None:
    for key, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            nan, inf = int(parameter.isnan().sum()), int(parameter.isinf().sum())
            raise HalfplateError(
                f"model={name!r}: {key} holds {nan} NaN and {inf} inf among {parameter.numel()} values, expected finite weights; "
                "download the model again"
            )
