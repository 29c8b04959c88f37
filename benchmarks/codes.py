"""One token through unpruned linears whose cores hold codes: processor time of one thread, relative to int8.

    python benchmarks/codes.py [--instructions avx2] [--cores int8 nl5 nl4] [--rounds 15]

Contenders take turns. In memory, each goes through copies of more than 128 MB, so that no cache holds the next one; in the cache, it
repeats one matrix. Ratios are medians of ratios within a round.
"""

import argparse
import ctypes
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--instructions", choices=("baseline", "avx2", "avx512"), help="default: the best of this machine"
    )
    parser.add_argument(
        "--cores", nargs="+", default=["int8", "nl5", "nl4"], help="the first is what the others are relative to"
    )
    parser.add_argument("--group", type=int, default=32, help="columns of a scale")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.instructions:
        os.environ["HALFPLATE_ISA"] = options.instructions  # read when the library is loaded
    for d_out, d_in in ((576, 1536), (1536, 576), (4096, 4096)):
        for place, nbytes in (("memory", 128 * 2**20), ("cache", 0)):
            times = measured(options, d_out, d_in, nbytes)
            first = times[options.cores[0]]
            shares = {
                core: statistics.median(a / b for a, b in zip(own, first, strict=True)) for core, own in times.items()
            }
            best = {core: f"{min(own) * 1e6:.0f} us, {shares[core]:.2f}" for core, own in times.items()}
            print(
                f"{d_in} x {d_out} in {place}:", "; ".join(f"{core} {text}" for core, text in best.items()), flush=True
            )


def measured(options: argparse.Namespace, d_out: int, d_in: int, nbytes: int) -> dict[str, list[float]]:
    """Seconds of a product in each round, for each core."""
    import torch
    from random_weights import random_tensors

    from halfplate.formats import WeightSpec
    from halfplate.kernels import linear, native
    from halfplate.pattern import DENSE

    torch.set_num_threads(1)
    run, matrices, times = native.library().halfplate_linear, {}, {}
    x, y = torch.randn(1, d_in), torch.empty(1, d_out)
    for core in options.cores:
        spec = WeightSpec(d_out, d_in, DENSE, core, group=options.group)
        packed = linear.pack(spec, random_tensors(spec))
        copies = [linear._aligned(packed.numel()) for _ in range(1 + nbytes // packed.numel())]
        for copy in copies:
            copy.copy_(packed)
        matrices[core], times[core] = copies, []
    for turn in range(options.rounds + 1):
        for core, copies in matrices.items():
            calls = [(ctypes.c_void_p(one.data_ptr()), one.numel()) for one in copies]
            calls *= max(1, 2**26 // (d_out * d_in * len(calls)))
            start = time.thread_time()
            for address, size in calls:
                run(address, size, x.data_ptr(), x.nbytes, d_in, y.data_ptr(), y.nbytes, 1, 1)
            if turn:
                times[core].append((time.thread_time() - start) / len(calls))
    return times


if __name__ == "__main__":
    main()
