"""The routers of experts: which tensors have a row for each expert, and which entries of a configuration count experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from halfplate.models.experts.joining import recognised
from halfplate.models.experts.module import experts_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Model types whose routers are known: a matrix (experts, hidden), and in some a bias or a correction (experts,) that only decides the choice.
ROUTED = ("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
# Their names in the module that holds the experts.
ROWS = ("gate.weight", "gate.e_score_correction_bias", "router.weight", "router.bias")
# Entries of configurations that count the experts of a layer; some classes know one of them by two names.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def router_rows(names: Iterable[str], experts: str) -> list[str]:
    """Those of the tensors `names` that have a row for each expert of the module `experts`."""
    block = experts.rpartition(".")[0]
    wanted = {f"{block}.{row}" for row in ROWS}
    return [name for name in names if name in wanted]


def router_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights and biases of the routers of a model, whose experts are linears or as transformers holds them."""
    parameters = dict(model.named_parameters())
    for module in [*recognised(model), *experts_of(model)]:
        for name in router_rows(parameters, module):
            yield parameters[name]


def experts_per_token(config: PretrainedConfig) -> int:
    """The experts of a layer that each token goes to."""
    return int(config.num_experts_per_tok)


def router_groups(config: PretrainedConfig) -> int:
    """The groups of experts of which a router chooses some, before it chooses experts in these; 1 if it does not."""
    method = getattr(config, "topk_method", None)
    if config.model_type == "deepseek_v2" and method != "group_limited_greedy":
        return 1
    return int(getattr(config, "n_group", None) or 1)


def least_in_a_group(config: PretrainedConfig) -> int:
    """The fewest experts of a group with which each token still finds its experts."""
    groups, per_token = router_groups(config), experts_per_token(config)
    if groups == 1:
        return per_token
    chosen = int(getattr(config, "topk_group", None) or 1)
    # The routers of DeepSeek-V3 and its kin rank a group by its two best experts.
    ranked = 1 if config.model_type == "deepseek_v2" else 2
    return max(ranked, -(-per_token // chosen))


def with_experts(config: Any, before: int, count: int) -> None:
    """Set the number of experts of a layer, in place. before: what it was."""
    for name in COUNTS:
        if getattr(config, name, None) == before:
            setattr(config, name, count)
