"""Description of a model family in GGUF files: its metadata keys, its tensor names, and the fixed settings of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Modules of a layer, or parameters that consist of several tensors of the file, by their names in transformers.
Names = Mapping[str, str | tuple[str, ...]]

REQUIRED: Any = object()

OUTER: Names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION: Names = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
QK_NORM: Names = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MLP: Names = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
EXPERTS: Names = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    # The stacked matrices of experts that are linears (halfplate.models.experts).
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
}
LLAMA: Names = {**ATTENTION, "post_attention_layernorm": "ffn_norm", **MLP}
# Two norms around each half of a layer, as in Gemma 2 and GLM 4.
GEMMA2: Names = {
    **ATTENTION,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **MLP,
}


@dataclass(frozen=True)
class Setting:
    """A metadata key (without the name of the architecture) and the field of the configuration with the same meaning.

    default: the value that llama.cpp uses if the key is absent.
    kind: int, float or bool.
    """

    key: str
    field: str
    kind: type
    default: Any = REQUIRED


@dataclass(frozen=True)
class Rope:
    """The rotary scalings that llama.cpp supports for a family.

    factors: it reads `rope_freqs.weight`, one divisor per frequency.
    longrope: it reads two such sets.
    yarn: it applies YaRN as transformers does.
    local: layers with a sliding window use unscaled frequencies, with the base of the key `rope.freq_base_swa` ("key") or the
        base of all layers ("same").
    """

    factors: bool = False
    longrope: bool = False
    yarn: bool = True
    local: str | None = None


@dataclass(frozen=True)
class Family:
    """One kind of model: the architecture name of llama.cpp, the model_type of transformers, and the mapping between them.

    block, outer: names of modules inside and outside the layers.
    settings: keys beyond those that all families have.
    eps: key and field of the epsilon of the norms.
    flags: fields that are true if a layer has one of these tensors.
    fixed: fields without a key, with the value that llama.cpp uses; a function receives the known fields.
    turned: llama.cpp rotates neighbouring values of a head and transformers the two halves, so rows of q and k are reordered.
    offset: the file holds the weights of norms plus this number.
    square: the heads together are as wide as the model.
    head_dim: the configuration has a field for the head size.
    head: `output.weight` may be missing ("either"), must be missing ("tied") or must exist ("own").
    partial: only part of a head may be rotated.
    period: if the file lists no sliding windows, every `period`-th layer has none; 0: no layer has a window.
    window_default: the window of a file that names none, None for no window.
    unused_window: the file names a window that llama.cpp does not apply; it is read, but a model with a window is not written.
    marker: key that distinguishes the family from others of its architecture.
    imported: False if a file of this architecture is read as another family.
    ignored: keys without an effect.
    """

    architecture: str
    model_type: str
    block: Names = field(default_factory=lambda: LLAMA)
    outer: Names = field(default_factory=lambda: OUTER)
    settings: tuple[Setting, ...] = ()
    eps: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any | Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    rope: Rope = field(default_factory=Rope)
    turned: bool = False
    offset: float = 0.0
    square: bool = False
    head_dim: bool = False
    head: str = "either"
    partial: bool = False
    period: int = 0
    window_default: Any = None
    unused_window: bool = False
    marker: str | None = None
    imported: bool = True
    ignored: tuple[str, ...] = ()
