"""How long a linear takes for one token on this machine."""

import copy
import time
from statistics import median

import torch
from torch import nn

from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.pattern import DENSE
from halfplate.runtime.backends import Options, backends, pack, pack_dense

COLD_BYTES = 96 * 2**20  # bytes of copies of a matrix that are read in turn, so that they are not in the cache
MOST_COPIES = 200
TIMINGS = 5


class Stopwatch:
    """Seconds of a linear per token, with weights read from memory; measured once per specification."""

    def __init__(self) -> None:
        self._known: dict[WeightSpec, float] = {}

    def dense(self, linear: nn.Linear) -> float:
        spec = WeightSpec(linear.out_features, linear.in_features, DENSE, "bf16")
        packed = pack_dense(linear, Options(dense_dtype="bf16"), backends())
        return self._time(spec, linear if isinstance(packed, str) else packed)

    def compressed(self, linear: CompressedLinear) -> float:
        packed = pack(linear, Options(), backends())
        # A shared wrapper costs the same time as an own one.
        return self._time(linear.spec.alone, linear if isinstance(packed, str) else packed)

    def _time(self, spec: WeightSpec, linear: nn.Module) -> float:
        if spec not in self._known:
            nbytes = sum(tensor.nbytes for tensor in linear.state_dict(keep_vars=True).values())
            copies = [
                copy.deepcopy(linear) for _ in range(max(2, COLD_BYTES // max(nbytes, COLD_BYTES // MOST_COPIES)))
            ]
            device: torch.device = linear.weight.device  # type: ignore[assignment]
            x = torch.randn(1, spec.d_in, dtype=torch.float32, device=device)
            rounds = []
            for _ in range(TIMINGS):
                start = time.perf_counter()
                for other in copies:
                    other(x)
                rounds.append((time.perf_counter() - start) / len(copies))
            self._known[spec] = median(rounds)
        return self._known[spec]
