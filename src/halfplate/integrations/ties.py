"""What transformers ties in a model with compressed modules, whose own entries say what they share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from halfplate.models.linears import in_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The attribute of transformers that names what it ties, and that of a model in which it was replaced.
NAMED, BEFORE = "_tied_weights_keys", "_halfplate_ties_before"


def note_untied(model: PreTrainedModel) -> None:
    """Record in the configuration if transformers has not tied a head, because the files hold one that differs from the embedding.

    Otherwise, code that ties by the configuration later, e.g. after saving and loading, would replace the head.
    """
    asked = model.get_expanded_tied_weights_keys(all_submodels=True)
    layers = {name for name, owner in asked.items() if in_layer(name) and in_layer(owner)}
    if asked.keys() - layers - model.all_tied_weights_keys.keys():
        model.config.tie_word_embeddings = False


def untie(model: PreTrainedModel, compressed: Collection[str]) -> None:
    """Let transformers tie nothing of the modules `compressed`, and the rest tensor by tensor: modules of several layers may differ."""
    tied: dict[str, str] = model.all_tied_weights_keys or {}
    left = {name: owner for name, owner in tied.items() if name.rpartition(".")[0] not in compressed}
    if any(in_layer(name) and in_layer(owner) for name, owner in tied.items() if name not in left):
        for module in _models(model):
            vars(module).setdefault(BEFORE, getattr(module, NAMED))
            setattr(module, NAMED, None)
        setattr(model, NAMED, left)
    model.all_tied_weights_keys = left


def tie_again(model: PreTrainedModel, owners: Mapping[str, str]) -> None:
    """Put a linear over the weight of the embedding or linear, the value, in the place of each module that borrows it, the key."""
    for name, owner in owners.items():
        borrower: Any = model.get_submodule(name)
        linear = nn.Linear(borrower.in_features, borrower.out_features, bias=borrower.bias is not None, device="meta")
        replaced: Any = model.get_submodule(owner)
        linear.weight, linear.bias = replaced.weight, borrower.bias
        if borrower is model.get_output_embeddings():
            model.config.tie_word_embeddings = True
        model.set_submodule(name, linear)
    for module in _models(model):
        if BEFORE in vars(module):
            setattr(module, NAMED, vars(module).pop(BEFORE))
    if owners:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _models(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, NAMED)]
