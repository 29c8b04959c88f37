"""Experts of transformers, whose weights are 3-D tensors, as ordinary linears `…experts.17.gate_proj`.

`linear_experts` replaces the modules of a model, before anything else sees it, and `joined_experts` restores them.
`expert_tensors` finds the tensors of each expert in the files of a model.
"""

from halfplate.models.experts.families import Call
from halfplate.models.experts.joining import joined_experts, linear_experts, recognised
from halfplate.models.experts.module import LinearExperts, experts_of, without_experts
from halfplate.models.experts.stages import ExpertStage, expert_stages
from halfplate.models.experts.stored import expert_tensors

__all__ = [
    "Call",
    "ExpertStage",
    "LinearExperts",
    "expert_stages",
    "expert_tensors",
    "experts_of",
    "joined_experts",
    "linear_experts",
    "recognised",
    "without_experts",
]
