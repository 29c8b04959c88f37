"""The tables of benchmarks/linears.py: ratios are medians over rounds of ratios within a round."""

from statistics import median
from typing import Any

from common import table

from halfplate.evaluation.speed import paired_ratio

Results = dict[str, Any]
Shape = tuple[int, int]

TORCH = ("torch fp32", "torch bf16")
OTHER_SHAPES = ("2:4 fp32", "2:4 bf16", "2:4 int8", "2:4 int4", "2:4 w8a8", "2:4 w4a8")
SPARSITY = ("fp32", "bf16", "int8", "int4", "w8a8", "w4a8")


def key(kind: str, shape: Shape, threads: int, batch: int) -> str:
    """Where a measurement is kept."""
    return f"{kind}/{shape[0]}x{shape[1]}/{threads}/{batch}"


def faster_torch(found: Results) -> str:
    """The dense linear of torch to compare with: fp32 or bf16, whichever is faster."""
    return min(TORCH, key=lambda name: median(found["seconds"][name]))


def times(found: Results, name: str, over: str) -> float:
    """How many times faster `name` is than `over`."""
    return paired_ratio(found["seconds"][over], found["seconds"][name])


def read_share(found: Results, name: str) -> float:
    """Bytes of the weight a second, of the bytes that the machine read in the same round."""
    nbytes = found["nbytes"][name]
    return median(nbytes / seconds / read for seconds, read in zip(found["seconds"][name], found["read"], strict=True))


def one_shape(results: Results, shape: Shape, threads: int) -> str:
    """Every contender at one token."""
    found = results[key("plain", shape, threads, 1)]
    rows = []
    for name, seconds in found["seconds"].items():
        rows.append(
            [f"**{name}**" if name.startswith("2:4") else name]
            + [f"{found['nbytes'][name] / (shape[0] * shape[1]):.3f}", f"{1e3 * median(seconds):.3f}"]
            + [f"{times(found, name, torch):.2f}" for torch in TORCH]
            + [f"{read_share(found, name):.2f}"]
        )
    rows += [[name, "", "not installed", "", "", ""] for name in found["absent"]]
    header = ["kernel", "bytes per weight", "ms", "× torch fp32", "× torch bf16", "of read bandwidth"]
    read = median(found["read"]) / 1e9
    return (
        f"{shape[0]}×{shape[1]}, one token, {threads} thread{'s' * (threads > 1)}; memory read {read:.1f} GB/s\n\n"
        + table(header, rows)
    )


def other_shapes(results: Results, shapes: tuple[Shape, ...], threads: int) -> str:
    """Our kernels at one token: the speedup over the faster dense linear of torch."""
    rows = []
    for shape in shapes:
        found = results[key("plain", shape, threads, 1)]
        best = faster_torch(found)
        cells = [f"{times(found, name, best):.2f} ({read_share(found, name):.2f})" for name in OTHER_SHAPES]
        rows.append([f"{shape[0]}×{shape[1]}", best, *cells])
    return table(["shape", "faster torch", *OTHER_SHAPES], rows)


def batches(results: Results, shape: Shape, threads: int, sizes: tuple[int, ...]) -> str:
    """Every contender by batch: the speedup over the faster dense linear of torch."""
    found = {batch: results[key("plain", shape, threads, batch)] for batch in sizes}
    names = [name for name in found[sizes[0]]["seconds"] if name in found[sizes[-1]]["seconds"]]
    rows = [["*ms of torch's faster*"] + [_best_ms(found[batch]) for batch in sizes]]
    for name in names:
        rows.append([name] + [f"{times(found[batch], name, faster_torch(found[batch])):.2f}" for batch in sizes])
    return table(["kernel", *(str(batch) for batch in sizes)], rows)


def _best_ms(found: Results) -> str:
    best = faster_torch(found)
    return f"{1e3 * median(found['seconds'][best]):.2f} ({best.removeprefix('torch ')})"


def sparsity(results: Results, shapes: tuple[Shape, ...], threads: tuple[int, ...]) -> str:
    """2:4 against our own dense kernel of the same precision, at one token."""
    rows = []
    for shape in shapes:
        for count in threads:
            found = results[key("plain", shape, count, 1)]
            cells = [f"{times(found, f'2:4 {core}', f'dense {core}'):.2f}" for core in SPARSITY]
            rows.append([f"{shape[0]}×{shape[1]}, {count} thread{'s' * (count > 1)}", *cells])
    bytes_of = results[key("plain", shapes[0], threads[0], 1)]["nbytes"]
    ceiling = [f"{bytes_of[f'dense {core}'] / bytes_of[f'2:4 {core}']:.2f}" for core in SPARSITY]
    return table(["", *SPARSITY], [*rows, ["*ratio of bytes, first shape*", *ceiling]])


def armor(results: Results, shape: Shape, threads: int, sizes: tuple[int, int] = (1, 512)) -> str:
    """Whole ARMOR linears: time over that of their core alone, bytes of the wrappers, and the large batch over torch fp32."""
    one, many = (results[key("armor", shape, threads, batch)] for batch in sizes)
    rows = []
    for name in one["seconds"]:
        if name.startswith("torch"):
            continue
        core = name if name.startswith("2:4") else f"2:4 {name.split()[2].rstrip(',')}"
        cells = [
            one["nbytes"][name] / one["nbytes"][core],
            1e3 * median(one["seconds"][name]),
            1 / times(one, name, core),
            times(one, name, faster_torch(one)),
            times(many, name, "torch fp32"),
            1 / times(many, name, core),
        ]
        rows.append([name, *(f"{cell:.3f}" if index == 1 else f"{cell:.2f}" for index, cell in enumerate(cells))])
    header = ["linear", "bytes, relative to the core", "ms, one token", "time, relative to the core"]
    header += [f"× torch ({faster_torch(one)[6:]})"]
    header += [f"batch {sizes[1]}: × torch fp32", f"batch {sizes[1]}: time, relative to the core"]
    return f"{threads} thread{'s' * (threads > 1)}\n\n" + table(header, rows)


def report(results: Results, shapes: tuple[Shape, ...], sizes: tuple[int, ...], threads: tuple[int, ...]) -> str:
    """The section of RESULTS.md."""
    first = results[key("plain", shapes[0], threads[0], 1)]
    parts = [f"`python benchmarks/linears.py` · {first['where']}"]
    for count in threads:
        parts += [f"### One token, {count} thread{'s' * (count > 1)}", one_shape(results, shapes[0], count)]
        parts += [
            "Speedup over the faster dense linear of torch (in brackets: share of the read bandwidth):",
            other_shapes(results, shapes, count),
        ]
    parts += ["### The gain from sparsity alone"]
    parts += ["2:4 compared with Halfplate's dense kernel of the same precision, one token:"]
    parts += [sparsity(results, shapes, threads), "### Batches"]
    for count in threads:
        shape = f"{shapes[0][0]}×{shapes[0][1]}"
        parts += [f"{shape}, {count} thread{'s' * (count > 1)}, speedup over the faster dense linear of torch:"]
        parts += [batches(results, shapes[0], count, sizes)]
    parts += ["### Wrappers", f"ARMOR linears of {shapes[0][0]}×{shapes[0][1]}, with wrappers:"]
    parts += [armor(results, shapes[0], count) for count in threads]
    return "\n\n".join(parts)
