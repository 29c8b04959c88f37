"""What the first layer reads: the embedded tokens, and the other arguments that every layer gets with them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from halfplate.calibration import BATCH
from halfplate.compression.hidden_states import HiddenStates
from halfplate.compression.token_arguments import TokenArguments
from halfplate.models.handover import BlockArguments, differing
from halfplate.models.streamed import StreamedModel

# The arguments of all layers by the number of samples in a batch.
Reference = dict[int, Sequence[BlockArguments]]


def reference_arguments(streamed: StreamedModel, ids: Tensor) -> Reference:
    """The arguments of all layers for every size of batch, computed with the first of the tokens `ids`, int64 (samples, L)."""
    ids = ids.to(streamed.device)
    with streamed.outer(head=False):
        return {size: streamed.embed(ids[:size]).all_arguments for size in {len(batch) for batch in ids.split(BATCH)}}


def write_first_inputs(
    streamed: StreamedModel, ids: Tensor, reference: Reference, hidden: HiddenStates, own: TokenArguments
) -> None:
    """Write the inputs of the first layer to `hidden`, and to `own` the arguments that differ from `reference` with their tokens."""
    with streamed.outer(head=False):
        for number, batch in enumerate(ids.to(streamed.device).split(BATCH)):
            inputs = streamed.embed(batch)
            hidden.write(number, inputs.hidden)
            own.write(number, differing(reference[len(batch)], inputs.all_arguments))
    own.finish(hidden.batches)
