"""The architectures that the native step decodes: for each, how it differs from Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

NormKind = Literal["rms", "rms+1", "mean", "mean+1"]
Rotation = Literal["halves", "pairs"]
Angles = Literal["twice", "in pairs", "once"]
Windows = Literal["none", "all", "by layer"]


@dataclass(frozen=True)
class Routing:
    """How the tokens of a mixture find their experts: by scores, a softmax or the logistic function of the router's outputs.

    module: name in a layer of the module with the `experts`; a layer whose module has none runs an ordinary MLP.
    router: name in that module of the router, which has a `weight` (experts, hidden) and `top_k`.
    normalised: whether the weights of a token's experts are divided by their sum; or the attribute of the router that says so.
    logistic: scores are not a softmax.
    correction: name in that module of a tensor (experts,) that is added to scores to choose experts, and not part of their weights; None for none.
    groups: attributes of the router: how many groups the experts form, and in how many of them, those whose two best have the largest sum, experts
        are chosen; None for one group.
    scale: attribute of the router, a factor of all weights; None for 1.
    least_sum: attribute of the router, the least that weights are divided by; None for none.
    shared: names in a layer of the linears of an expert that all tokens use, as in `Architecture.mlp`.
    shared_gate: name in a layer of the linear whose logistic function weighs its output; None for a weight of 1.
    """

    module: str = "mlp"
    router: str = "gate"
    normalised: bool | str = True
    logistic: bool = False
    correction: str | None = None
    groups: tuple[str, str] | None = None
    scale: str | None = None
    least_sum: str | None = None
    shared: tuple[str, ...] = ()
    shared_gate: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Names of the modules of an architecture, and the traits that its configuration does not state. The defaults are Llama's.

    norms: names in a layer of the norms before attention, of its output, before the MLP and of its output; None for none.
    norm: the root of the mean square or mean and variance (LayerNorm); `+1`: weights are added to 1. Weights and biases may be missing.
    final_norm: name in the inner model.
    head_norms: names in a layer of the norms of queries and keys, if it has them.
    asks_for_head_norms: entry of the configuration that says whether it has them; None if it always has.
    whole_norms: they are of all heads together, not of each.
    late_norms: they follow the rotation.
    qkv: names of the linears whose outputs, one below the other, are queries, keys and values.
    out: name of the linear after attention.
    mlp: names of the linears before the activation, and of the one after it.
    gated: the MLP has a gate, alone or above the up projection in one linear.
    activation: entry of the configuration.
    clamped: gate and up are bounded as in gpt-oss, whatever the entry says; its experts have the bounds.
    parallel: the MLP reads what attention reads.
    windows: layers whose attention reads the last positions alone: none, all if the configuration has a window, or those of its `layer_types`.
    rotation: which numbers of a head are rotated together: (i, i + half), or (2 i, 2 i + 1).
    angles: how rotary tables list the angles of these pairs: all of them twice, each twice in a row, or once.
    rotated: whether an attention module rotates queries and keys.
    sinks: name in a layer of a parameter (heads,), scores that attention counts and that belong to no position.
    embedding_scale, residual_scale, logit_scale, logit_divisor, attention_cap, logit_cap: entries of the configuration.
    mixture: the experts of its layers.
    refused: entries of the configuration that have no native step if they are set.
    language_model: class of the language model in a model that also reads images; the rest of it only sees the prompt.
    """

    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    norm: NormKind = "rms"
    final_norm: str = "norm"
    head_norms: tuple[str, str] | None = None
    asks_for_head_norms: str | None = None
    whole_norms: bool = False
    late_norms: bool = False
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    gated: bool = True
    activation: str = "hidden_act"
    clamped: bool = False
    parallel: bool = False
    windows: Windows = "none"
    rotation: Rotation = "halves"
    angles: Angles = "twice"
    rotated: Callable[[Any], bool] = lambda attention: True
    sinks: str | None = None
    embedding_scale: str | None = None
    residual_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    attention_cap: str | None = None
    logit_cap: str | None = None
    mixture: Routing | None = None
    refused: tuple[str, ...] = ()
    language_model: str | None = None


EACH_HEAD = ("self_attn.q_norm", "self_attn.k_norm")
# Norms on both sides of attention and of the MLP, and behind them only.
AROUND = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
BEHIND = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
FUSED_MLP = ("mlp.gate_up_proj", "mlp.down_proj")

LLAMA = Architecture()
QWEN2 = Architecture(windows="by layer")
QWEN3 = replace(QWEN2, head_norms=EACH_HEAD)
GEMMA = Architecture(norm="rms+1", refused=("use_bidirectional_attention",))
GEMMA2 = replace(
    GEMMA,
    norms=AROUND,
    activation="hidden_activation",
    windows="by layer",
    attention_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
)
GEMMA3 = replace(GEMMA2, head_norms=EACH_HEAD, attention_cap=None)
OLMO2 = Architecture(norms=BEHIND, head_norms=EACH_HEAD, whole_norms=True)
GRANITE = Architecture(
    embedding_scale="embedding_multiplier", residual_scale="residual_multiplier", logit_divisor="logits_scaling"
)
COHERE = Architecture(
    norms=("input_layernorm", None, None, None),
    norm="mean",
    parallel=True,
    rotation="pairs",
    angles="in pairs",
    logit_scale="logit_scale",
    refused=("use_qk_norm",),
)
QWEN2_MOE = Routing(
    normalised="norm_topk_prob",
    shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
    shared_gate="mlp.shared_expert_gate",
)
GRANITE_MOE = Routing(module="block_sparse_moe", router="router")
SHARED_EXPERTS = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")
# Scores of each expert alone, corrected, of experts in groups: as in DeepSeek-V3.
GROUPED = Routing(
    normalised="norm_topk_prob",
    logistic=True,
    correction="gate.e_score_correction_bias",
    groups=("num_group", "topk_group"),
    scale="routed_scaling_factor",
    shared=SHARED_EXPERTS,
)
GLM = Architecture(rotation="pairs", mlp=FUSED_MLP)

ARCHITECTURES: dict[str, Architecture] = {
    "ArceeForCausalLM": Architecture(mlp=("mlp.up_proj", "mlp.down_proj"), gated=False),
    "CohereForCausalLM": COHERE,
    "Cohere2ForCausalLM": replace(
        COHERE, windows="by layer", rotated=lambda attention: attention.sliding_window is not None, refused=()
    ),
    "CwmForCausalLM": QWEN2,
    "Dots1ForCausalLM": replace(QWEN3, mixture=GROUPED),
    "Ernie4_5ForCausalLM": Architecture(rotation="pairs"),
    "Ernie4_5_MoeForCausalLM": Architecture(
        rotation="pairs",
        mixture=Routing(
            correction="gate.moe_statics.e_score_correction_bias", least_sum="norm_min", shared=SHARED_EXPERTS
        ),
    ),
    "Exaone4ForCausalLM": Architecture(
        norms=BEHIND,
        head_norms=EACH_HEAD,
        windows="by layer",
        rotated=lambda attention: attention.sliding_window is None or attention.is_sliding,
    ),
    "FlexOlmoForCausalLM": replace(OLMO2, mixture=Routing(normalised="norm_topk_prob")),
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": replace(GEMMA3, logit_cap=None, language_model="Gemma3TextModel"),
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": replace(
        GLM,
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ),
    "Glm4MoeForCausalLM": Architecture(head_norms=EACH_HEAD, asks_for_head_norms="use_qk_norm", mixture=GROUPED),
    "GptOssForCausalLM": Architecture(
        windows="by layer", angles="once", clamped=True, sinks="self_attn.sinks", mixture=Routing(router="router")
    ),
    "GraniteForCausalLM": GRANITE,
    "GraniteMoeForCausalLM": replace(GRANITE, mixture=GRANITE_MOE),
    "GraniteMoeSharedForCausalLM": replace(
        GRANITE, mixture=replace(GRANITE_MOE, shared=("shared_mlp.input_linear", "shared_mlp.output_linear"))
    ),
    "HeliumForCausalLM": Architecture(rotation="pairs"),
    "HunYuanDenseV1ForCausalLM": Architecture(
        head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"), late_norms=True
    ),
    "LlamaForCausalLM": LLAMA,
    "MinistralForCausalLM": QWEN2,
    "MiniMaxM2ForCausalLM": Architecture(
        head_norms=EACH_HEAD, whole_norms=True, mixture=Routing(logistic=True, correction="e_score_correction_bias")
    ),
    "MistralForCausalLM": Architecture(windows="all"),
    "Mistral3ForConditionalGeneration": Architecture(windows="all", language_model="MistralModel"),
    "MixtralForCausalLM": Architecture(windows="all", mixture=Routing()),
    "NemotronForCausalLM": Architecture(norm="mean+1", mlp=("mlp.up_proj", "mlp.down_proj"), gated=False),
    "OlmoForCausalLM": Architecture(norm="mean", refused=("clip_qkv",)),
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": replace(OLMO2, windows="by layer"),
    "OlmoeForCausalLM": Architecture(
        head_norms=EACH_HEAD, whole_norms=True, mixture=Routing(normalised="norm_topk_prob"), refused=("clip_qkv",)
    ),
    "PhiForCausalLM": Architecture(
        norms=("input_layernorm", None, None, None),
        norm="mean",
        final_norm="final_layernorm",
        out="self_attn.dense",
        mlp=("mlp.fc1", "mlp.fc2"),
        gated=False,
        parallel=True,
        refused=("qk_layernorm",),
    ),
    "Phi3ForCausalLM": Architecture(qkv=("self_attn.qkv_proj",), mlp=FUSED_MLP, windows="all"),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": replace(QWEN2, mixture=QWEN2_MOE),
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": replace(QWEN3, windows="all", mixture=Routing(normalised="norm_topk_prob")),
    "SeedOssForCausalLM": LLAMA,
    "SmolLM3ForCausalLM": replace(QWEN2, rotated=lambda attention: bool(attention.use_rope)),
    "SolarOpenForCausalLM": Architecture(mixture=GROUPED),
    "StableLmForCausalLM": Architecture(norm="mean", refused=("use_parallel_residual", "qk_layernorm")),
    "Starcoder2ForCausalLM": Architecture(norm="mean", mlp=("mlp.c_fc", "mlp.c_proj"), gated=False, windows="all"),
}


def architecture_of(model: Any) -> Architecture | str:
    """The architecture of a transformers model, or why it has no native step."""
    kind = type(model)
    if not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is not a class of transformers, and has no native step"
    found = ARCHITECTURES.get(kind.__name__)
    if found is None:
        return f"{kind.__name__} has no native step"
    inner = type(inner_of(model)).__name__
    if found.language_model not in (None, inner):
        return f"{kind.__name__} with {inner} has no native step, only with {found.language_model}"
    if found.asks_for_head_norms and not getattr(config_of(model), found.asks_for_head_norms):
        found = replace(found, head_norms=None)
    return found


def inner_of(model: Any) -> Any:
    """The module with the embedding, the layers and the last norm of a model."""
    return getattr(model.model, "language_model", model.model)


def config_of(model: Any) -> Any:
    """The configuration of the language model of a model."""
    return getattr(model.config, "text_config", model.config)
