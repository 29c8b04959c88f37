"""How long a linear takes for one token on this machine."""

import copy
import time
from statistics import median

import torch
from torch import nn

from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.kernels.linear import unsupported
from halfplate.pattern import DENSE
from halfplate.runtime.linear import PackedLinear

COLD_BYTES = 96 * 2**20  # copies of a matrix that are read in turn, so that each comes from memory
MOST_COPIES = 200
TIMINGS = 5


class Stopwatch:
    """Seconds that a linear takes for one token, read from memory; one measurement serves all of one specification."""

    def __init__(self) -> None:
        self._known: dict[WeightSpec, float] = {}

    def dense(self, linear: nn.Linear) -> float:
        spec = WeightSpec(linear.out_features, linear.in_features, DENSE, "bf16")
        packed = None if unsupported(spec) else PackedLinear.of_dense(linear, "bf16")
        return self._time(spec, linear if packed is None else packed)

    def compressed(self, linear: CompressedLinear) -> float:
        packed = None if unsupported(linear.spec) else PackedLinear.of_compressed(linear)
        # One that shares a wrapper applies it as one of its own does.
        return self._time(linear.spec.alone, linear if packed is None else packed)

    def _time(self, spec: WeightSpec, linear: nn.Module) -> float:
        if spec not in self._known:
            nbytes = sum(tensor.nbytes for tensor in linear.state_dict(keep_vars=True).values())
            copies = [
                copy.deepcopy(linear) for _ in range(max(2, COLD_BYTES // max(nbytes, COLD_BYTES // MOST_COPIES)))
            ]
            held = next(iter(linear.state_dict().values()))
            x = torch.randn(1, spec.d_in, dtype=torch.float32, device=held.device)
            rounds = []
            for _ in range(TIMINGS):
                start = time.perf_counter()
                for other in copies:
                    other(x)
                rounds.append((time.perf_counter() - start) / len(copies))
            self._known[spec] = median(rounds)
        return self._known[spec]
