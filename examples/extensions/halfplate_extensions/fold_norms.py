"""A transform that multiplies each RMSNorm weight into the linears that read its output, and sets it to ones."""

from collections.abc import Iterator

import torch
from torch import Tensor

from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.transforms import Maker, Piece, Transform

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # their norms multiply by the weight, not by 1 + weight
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


class FoldNorms(Transform):
    """Folds all norms, except the last one if the head is tied to the embedding, which must not change."""

    name = "fold_norms"
    version = 1
    summary = "multiply the weight of each RMSNorm into the linears that read its output"

    def refusal(self, source: Source) -> str | None:
        kind = source.config.model_type
        return None if kind in FAMILIES else f"it is a {kind} model, expected one of {', '.join(FAMILIES)}"

    def open(self, source: Source) -> Maker:
        model = StreamedModel(source)

        def make(piece: Piece) -> Iterator[tuple[str, Tensor]]:
            norms = _norms(model, piece.index)
            for name in piece.entries:
                module, _, leaf = name.rpartition(".")
                tensor = model.read(name)
                if module in norms.values():
                    tensor = torch.ones_like(tensor)
                elif module in norms and leaf == "weight":
                    tensor = tensor * model.read(f"{norms[module]}.weight")
                yield name, tensor

        return make


def _norms(model: StreamedModel, layer: int | None) -> dict[str, str]:
    """The norm before each linear of a layer, or before the head."""
    if layer is None:
        return {"lm_head": "model.norm"} if "lm_head.weight" in model.stored else {}
    prefix = f"{model.prefix}.{layer}"
    return {f"{prefix}.{reader}": f"{prefix}.{norm}" for norm, readers in READERS.items() for reader in readers}


FOLD_NORMS = FoldNorms()
