"""Export to the format of GPTQ, version 2, which GPTQModel and vLLM load: 2, 3, 4 or 8 bits, symmetric, in groups."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.exports.packed_folder import Codes, PackedFormat, Scheme, export_packed
from halfplate.models.packed_words import WORD, pack_words, read_gptq
from halfplate.version import package_version


def export_gptq(source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint of unpruned codes without wrappers as a folder (see `halfplate.exports.Exporter`).

    Codes and scales are kept; all else is written in fp16. Codes of 5 and 6 bits and of tables are held in 8. Embedding and
    output layer are floats.
    """
    return export_packed(FORMAT, source, out, overwrite)


def _pack(matrix: Codes, scheme: Scheme) -> dict[str, Tensor]:
    codes, scales = matrix.codes, matrix.scales
    columns = codes.shape[1]
    zeros = torch.full((scales.shape[1], len(codes)), 1 << scheme.bits - 1, dtype=torch.uint8, device="cpu")
    return {
        "qweight": pack_words(codes, scheme.bits).T.contiguous(),
        "qzeros": pack_words(zeros, scheme.bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32, device="cpu") // scheme.group,
    }


def _configuration(schemes: Mapping[str, Scheme], others: list[str]) -> dict[str, Any]:
    usual = Counter(schemes.values()).most_common(1)[0][0]
    # GPTQModel's way to name modules that differ: "+:" has other settings, "-:" is not quantised. Output layers never are.
    dynamic: dict[str, dict[str, int]] = {
        f"+:^{re.escape(name)}$": {"bits": scheme.bits, "group_size": scheme.group}
        for name, scheme in schemes.items()
        if scheme != usual
    }
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in others if name != "lm_head"}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": usual.bits,
        "group_size": usual.group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"halfplate:{package_version()}"]},
    } | ({"dynamic": dynamic} if dynamic else {})


FORMAT = PackedFormat(
    name="gptq",
    recipe="vllm-w4",
    bits=(2, 3, 4, 8),
    keeps_fp32=False,
    pack=_pack,
    read=lambda tensors, scheme: read_gptq(tensors, scheme.bits, zeros_less_one=False),
    configuration=_configuration,
    rows=WORD,
)
