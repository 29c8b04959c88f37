"""Planning the embedding and the output layer, the two tables outside the decoder layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from halfplate.errors import HalfplateError
from halfplate.formats.embedding import embedding_scale
from halfplate.formats.plain import is_plain_linear
from halfplate.formats.quantizers.rounding import GROUPS
from halfplate.formats.spec import WeightSpec
from halfplate.models.data_reads import reader_of
from halfplate.pattern import DENSE
from halfplate.planning.plan import MatrixPlan
from halfplate.recipe import AUTO, KEEP, Recipe

AUTO_DTYPE = "int8"


def plan_tables(model: PreTrainedModel, recipe: Recipe) -> list[MatrixPlan]:
    """The embedding and the head as the recipe stores them; an empty list if it keeps both.

    A tied head is stored with the embedding (`WeightSpec.same_as`). Raises HalfplateError if the recipe names a type for a table
    that cannot be compressed, or two types for a tied pair.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if head is not None and head.weight is embedding.weight:
        dtype = _one_dtype(recipe)
        refusal = _refusal(model, embedding) or _refusal(model, head)
        table = _planned("embedding_dtype", names[embedding], embedding, dtype, refusal, recipe)
        if not table or table[0].spec is None:
            return table
        spec = replace(table[0].spec, same_as=names[embedding])
        stored = f"tied: stored as {names[embedding]}"
        return [*table, replace(table[0], name=names[head], spec=spec, reason=stored)]
    found = _planned(
        "embedding_dtype", names[embedding], embedding, recipe.embedding_dtype, _refusal(model, embedding), recipe
    )
    if head is None:
        return found
    return found + _planned("head_dtype", names[head], head, recipe.head_dtype, _refusal(model, head), recipe)


def _one_dtype(recipe: Recipe) -> str:
    """The type of a table that is both embedding and head."""
    asked = {dtype for dtype in (recipe.embedding_dtype, recipe.head_dtype) if dtype != KEEP}
    if len(asked) > 1 and AUTO in asked:
        asked.remove(AUTO)
    if len(asked) > 1:
        raise HalfplateError(
            f"embedding_dtype={recipe.embedding_dtype!r}, head_dtype={recipe.head_dtype!r}: the model's output layer is its embedding, "
            "so both have one type; leave one of them out"
        )
    return asked.pop() if asked else KEEP


def _refusal(model: nn.Module, module: nn.Module) -> str | None:
    """Why the table of an embedding or a head must stay as it is; None if it can be compressed."""
    if (reader := reader_of(model, module)) is not None:
        return f"its weight is read as data by {reader}"
    if isinstance(module, nn.Embedding):
        return None if embedding_scale(module) is not None else f"{type(module).__name__} does more than look up rows"
    return None if is_plain_linear(module) else f"{type(module).__name__} has a forward of its own"


def _planned(field: str, name: str, module: Any, dtype: str, refusal: str | None, recipe: Recipe) -> list[MatrixPlan]:
    if dtype == KEEP:
        return []
    if refusal is not None and dtype != AUTO:
        raise HalfplateError(f"{field}={dtype!r}: {name} must stay as it is ({refusal}); try {field}={AUTO!r}")
    rows, columns = shape = tuple(module.weight.shape)
    # The smallest groups are for types under super-scales.
    group = max(recipe.group_size, GROUPS[1]) if dtype == AUTO else recipe.group_size
    spec = WeightSpec(rows, columns, DENSE, AUTO_DTYPE if dtype == AUTO else dtype, group=group)
    reason = None if refusal is None else f"{refusal}; not compressed"
    # A search on the model's KL runs with its tables as they are.
    free = dtype == AUTO and recipe.sized and recipe.evolution is None
    return [MatrixPlan(name, shape, None, recipe.method, None if reason else spec, reason, free=free)]
