"""Export to compressed-tensors, format pack-quantized, which vLLM, SGLang and transformers load: 4 or 8 bits, symmetric, in groups."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfplate.exports.packed_folder import Codes, PackedFormat, Scheme, export_packed
from halfplate.models.packed_words import pack_words, read_compressed_tensors


def export_compressed_tensors(source: str, out: Path, overwrite: bool) -> str:
    """Write a checkpoint of unpruned codes without wrappers as a folder (see `halfplate.exports.Exporter`).

    Codes and scales are kept. A model in bf16 is written in fp16, because bf16 does not hold fp16 scales; one in fp32 stays so.
    Codes of 2 and 3 bits are held in 4, codes of 5 and 6 bits and of tables in 8. Embedding and output layer are floats.
    """
    return export_packed(FORMAT, source, out, overwrite)


def _pack(matrix: Codes, scheme: Scheme) -> dict[str, Tensor]:
    codes, scales = matrix.codes, matrix.scales
    return {
        "weight_packed": pack_words(codes, scheme.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64, device="cpu"),
    }


def _configuration(schemes: Mapping[str, Scheme], others: list[str]) -> dict[str, Any]:
    targets = defaultdict(list)
    for name, scheme in schemes.items():
        targets[scheme].append(name)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(targets) == 1 else names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": scheme.group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for number, (scheme, names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": others,
    }


FORMAT = PackedFormat(
    name="compressed-tensors",
    recipe="vllm-w4",
    bits=(4, 8),
    keeps_fp32=True,
    pack=_pack,
    read=lambda tensors, scheme: read_compressed_tensors(tensors, scheme.bits),
    configuration=_configuration,
)
