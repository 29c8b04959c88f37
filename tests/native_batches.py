"""The native step for several sequences, one position after another."""

import torch

from halfplate.runtime.cache import GrowingCache


@torch.no_grad()
def batch_logits(model, ids, mask, threads=1, dtype=torch.float32):
    """Logits (sequences, L, vocabulary) of texts with padding on the left, by the step alone. ids, mask: int64 (sequences, L)."""
    torch.set_num_threads(threads)
    count, length = ids.shape
    first, positions, traits = length - mask.sum(1), (mask.cumsum(1) - 1).clamp_min(0), model.native_decoder.traits
    room = max(16, length)  # some buffers are longer than the texts
    cache = GrowingCache.with_room(len(traits.layers), count, traits.kv_heads, room, traits.head_dim, dtype)
    steps = [
        model.native_decoder.step_batch(ids[:, i], cache, positions[:, i].contiguous(), first.clamp_max(i))
        for i in range(length)
    ]
    return torch.stack(steps, 1)
