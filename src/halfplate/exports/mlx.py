"""Export to a folder for MLX on Apple's machines: affine codes of 2 to 8 bits in groups, embeddings included."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.checkpoint.config import CONFIG_FILE, read_json
from halfplate.errors import HalfplateError, HalfplateWarning
from halfplate.exports.packed_folder import Codes, PackedFormat, Scheme, export_packed
from halfplate.models.packed_words import pack_words, read_mlx

# Tiny models of these types gave mlx-lm 0.32 the logits of the checkpoint.
CHECKED = ("llama", "mistral", "qwen2", "qwen3")


def export_mlx(source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint of unpruned codes without wrappers as a folder (see `halfplate.exports.Exporter`).

    Codes, scales and minima are kept. Values around 0 get the minimum −scale · 2^(bits − 1), which fp16 holds. A model in bf16 is written in
    fp16, because bf16 does not hold fp16 scales; one in fp32 stays so. Codes of tables are held in 8 bits.
    """
    told = export_packed(FORMAT, source, out, overwrite)
    kind = read_json(out / CONFIG_FILE).get("model_type")
    if kind not in CHECKED:
        warnings.warn(
            f"format='mlx': mlx-lm was not tried with a {kind} model of Halfplate, and may want other names; tried are {', '.join(CHECKED)}",
            HalfplateWarning,
            stacklevel=2,
        )
    return told


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
)
