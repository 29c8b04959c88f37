"""Export to a folder for MLX on Apple's machines: affine codes of 2 to 8 bits in groups, embeddings included."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.checkpoint.config import CONFIG_FILE, read_json
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.exports.packed_folder import Codes, PackedFormat, Scheme, export_packed
from halfplate.models.packed_words import pack_words, read_mlx

SLIDING = "sliding_attention"
# Tiny models of these types gave mlx-lm 0.32.2 the logits of the checkpoint, and those of WINDOWED also beyond their windows.
CHECKED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "granite",
    "olmo2",
    "olmo3",
    "cohere",
    "cohere2",
    "starcoder2",
    "smollm3",
    "ernie4_5",
    "glm4",
    "stablelm",
    "seed_oss",
    "exaone4",
    "helium",
    "nemotron",
    "hunyuan_v1_dense",
]
WINDOWED = ("gemma3_text", "olmo3", "cohere2", "exaone4")


def export_mlx(source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint of unpruned codes without wrappers as a folder (see `halfplate.exports.Exporter`).

    Codes, scales and minima are kept. Values around 0 get the minimum −scale · 2^(bits − 1), which fp16 holds. A model in bf16 is written in
    fp16, because bf16 does not hold fp16 scales; one in fp32 stays so. Codes of tables are held in 8 bits.
    """
    told = export_packed(FORMAT, source, out, overwrite)
    config = read_json(out / CONFIG_FILE)
    for doubt in _doubts(config):
        warnings.warn(f"format='mlx': {doubt}", HalfplateWarning, stacklevel=2)
    return told


def _doubts(config: Mapping[str, Any]) -> Iterator[str]:
    """What mlx-lm may compute otherwise."""
    kind = config.get("model_type")
    if kind not in CHECKED:
        yield f"mlx-lm was not tried with a {kind} model of Halfplate, and may want other names; tried are {', '.join(CHECKED)}"
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    used = config.get("use_sliding_window") is not False and SLIDING in (config.get("layer_types") or (SLIDING,))
    if used and isinstance(window, int) and isinstance(longest, int) and window < longest and kind not in WINDOWED:
        yield f"mlx-lm computes {kind} models without their window of {window} tokens, so its results differ for longer texts"


def _older_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that transformers wrote before its version 5, which mlx-lm reads."""
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    local = rope.get(SLIDING)
    if isinstance(local, Mapping):
        found["rope_local_base_freq"] = local.get("rope_theta")
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaled = rope.get("rope_type", "default") != "default"
    found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None
    kinds = config.get("layer_types") or ()
    if SLIDING in kinds and "full_attention" in kinds:
        period = kinds.index("full_attention") + 1
        if all((kind == SLIDING) == ((number + 1) % period != 0) for number, kind in enumerate(kinds)):
            letters = config.get("model_type") == "exaone4"
            found["sliding_window_pattern"] = "L" * (period - 1) + "G" if letters else period
    return found


def _pack(matrix: Codes, scheme: Scheme) -> dict[str, Tensor]:
    half = 1 << scheme.bits - 1
    biases = -half * matrix.scales if matrix.minima is None else matrix.minima
    if not bool(biases.isfinite().all()):
        raise HalfplateError(
            f"format='mlx' holds fp16 numbers, and a scale times {half} is beyond their range; export it as dense"
        )
    return {
        "weight": pack_words(matrix.codes, scheme.bits).view(torch.uint32),
        "scales": matrix.scales,
        "biases": biases,
    }


def _configuration(schemes: Mapping[str, Scheme], others: list[str]) -> dict[str, Any]:
    usual = Counter(schemes.values()).most_common(1)[0][0]
    different = {name: _entry(scheme) for name, scheme in schemes.items() if scheme != usual}
    return {**_entry(usual), "mode": "affine", **different}


def _entry(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group, "bits": scheme.bits}


FORMAT = PackedFormat(
    name="mlx",
    recipe="mlx-w4",
    bits=(2, 3, 4, 5, 6, 8),
    keeps_fp32=True,
    pack=_pack,
    read=lambda tensors, scheme: read_mlx(tensors, scheme.bits),
    configuration=_configuration,
    minima=True,
    tables=True,
    entry="quantization",
    further=_older_entries,
)
