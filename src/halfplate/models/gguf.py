"""Dense models from `.gguf` files, through transformers' own GGUF loading and around its two traps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfplate.errors import HalfplateError
from halfplate.models.gguf_header import GgufContents, check_header

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FIELDS = ("general.architecture", "general.license", "tokenizer.ggml.pre", "split.count")

# Vocabularies (`tokenizer.ggml.pre`) that cut numbers into single digits before GPT-2's own splitting; transformers
# 5.23 knows none of them and falls back to GPT-2's splitting alone. Source: the regular expressions of llama.cpp.
DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself: architecture, how its vocabulary splits text and its licence (None: it does not say), what it holds."""

    architecture: str
    pre_tokenizer: str | None
    contents: GgufContents
    licence: str | None = None


def read_header(path: Path, name: str) -> GgufHeader:
    """Read the metadata of the `.gguf` file that the user named `name`.

    Raises HalfplateError when the file is no GGUF file, cut short, or one of several parts.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise HalfplateError(
            f"model={name!r} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'; download it again"
        )
    try:
        contents = check_header(path)
        reader = GGUFReader(path)
        fields = {key: reader.fields[key].contents() for key in FIELDS if key in reader.fields}
    # A file that ends inside its metadata or its tensors shows as whatever numpy makes of the missing bytes.
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise HalfplateError(
            f"model={name!r} is cut short or damaged: {path.name} has {path.stat().st_size} bytes and "
            f"does not hold all that its header names ({reason}); download it again"
        ) from None
    splits = fields.get("split.count", 1)
    if isinstance(splits, int) and splits > 1:
        raise HalfplateError(
            f"model={name!r} is one of {fields['split.count']} parts of a split GGUF file; "
            "join them with `llama-gguf-split --merge` and pass the joined file"
        )
    pre_tokenizer = fields.get("tokenizer.ggml.pre")
    licence = fields.get("general.license")
    spoken = pre_tokenizer if isinstance(pre_tokenizer, str) else None
    return GgufHeader(
        str(fields.get("general.architecture")), spoken, contents, licence if isinstance(licence, str) else None
    )


def read_config(path: Path, name: str) -> "PretrainedConfig":
    """The model's configuration; raises HalfplateError for an architecture that transformers cannot read from GGUF."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    # Metadata is data of any shape, and the libraries fail on it with errors of their own.
    except Exception as error:
        raise _cannot_read(name, error) from None
    return config


def load_model(path: Path, name: str, config: "PretrainedConfig") -> "tuple[PreTrainedModel, dict[str, Any]]":
    """The model in fp32 with plain weights, and transformers' report on loading it."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer versions may otherwise keep the weights packed in GGUF's own blocks.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, report = loader.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise _cannot_read(name, error) from None
    _forget_quantization(model)
    return model, report


def read_tensors(path: Path, name: str, model: "PreTrainedModel") -> "Iterator[tuple[str, Tensor]]":
    """Every tensor of the file under the name that it has in `model`, in fp32, one at a time.

    Parts of experts, which become whole only together, are held to the end.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    try:
        config = model.config.to_dict()
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
        names = get_gguf_hf_weights_map(model, processor)
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for entry in reader.tensors:
            # The reader maps the file; read so, its pages do not count as ours.
            raw = np.fromfile(path, np.uint8, entry.n_bytes, offset=int(entry.data_offset))
            values = dequantize(raw.view(entry.data.dtype).reshape(entry.data.shape), entry.tensor_type)
            done = processor.process(
                weights=values, name=entry.name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            if done.name in names:
                yield names[done.name], torch.from_numpy(np.ascontiguousarray(done.weights, dtype=np.float32))
        yield from parsed["tensors"].items()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise _cannot_read(name, error) from None


def load_tokenizer(path: Path, name: str, header: GgufHeader) -> "PreTrainedTokenizerBase":
    """The tokenizer inside the file, splitting digits where its vocabulary was trained on split digits."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    # Metadata is data of any shape, and the libraries fail on it with errors of their own.
    except Exception as error:
        raise _cannot_read(name, error) from None
    if header.pre_tokenizer in DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _forget_quantization(model: "PreTrainedModel") -> None:
    """Drop transformers' note that the weights came quantised: they are plain now, and it refuses to save a model so marked."""
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)


def _cannot_read(name: str, error: Exception) -> HalfplateError:
    reason = str(error).strip().partition("\n")[0]
    return HalfplateError(
        f"model={name!r} cannot be read by transformers' GGUF loading: {reason}; pass the model as a safetensors folder instead"
    )
