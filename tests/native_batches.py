"""The native step for several sequences, one position or several after another."""

import torch

from halfplate.runtime.cache import GrowingCache


@torch.no_grad()
def batch_logits(model, ids, mask, threads=1, dtype=torch.float32, at_once=1):
    """Logits (sequences, L, vocabulary) of texts with padding on the left, by the step alone. ids, mask: int64 (sequences, L).

    at_once: tokens of each sequence in a step.
    """
    torch.set_num_threads(threads)
    count, length = ids.shape
    first, positions, decoder = length - mask.sum(1), (mask.cumsum(1) - 1).clamp_min(0), model.native_decoder
    traits = decoder.traits
    room = max(16, length)  # some buffers are longer than the texts
    cache = GrowingCache.with_room(len(traits.layers), count, traits.kv_heads, room, traits.head_dim, dtype)
    steps = []
    for start in range(0, length, at_once):
        end = min(start + at_once, length)
        part, places = ids[:, start:end], positions[:, start:end]
        if at_once == 1:
            steps.append(
                decoder.step_batch(ids[:, start], cache, places[:, 0].contiguous(), first.clamp_max(start))[:, None]
            )
        else:
            steps.append(decoder.step_rows(part, cache, places, first.clamp_max(end - 1)))
    return torch.cat(steps, 1)
