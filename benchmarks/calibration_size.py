"""How much calibration text a full Gram matrix needs: layer error on text it has not seen, as the text grows.

    python benchmarks/calibration_size.py

Three decoder blocks of SmolLM2-135M are solved with statistics of 4k to 128k tokens of WikiText-2 train, with and without
damping, and judged by the true output error on the calibration text and on 16k tokens of WikiText-2 valid, both inputs of
the dense model. What was measured is kept in benchmarks/results; some 15 minutes of one core.
"""

import argparse
import json
from typing import Any

import torch
from common import DATA, ROOT, smollm2_gguf, table, write_section
from torch import Tensor

from halfplate.calibration import calibration_tokens, collect_block
from halfplate.execution.matrix import relative_error
from halfplate.formats import WeightSpec
from halfplate.methods import create
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.linears import find_linears
from halfplate.models.sources import load_dense
from halfplate.pattern import Pattern
from halfplate.statistics import InputStatistics, Statistic

KEPT = ROOT / "benchmarks" / "results" / "calibration_size.json"
SIZES = (4096, 8192, 16384, 32768, 65536, 131072)
BLOCKS = (3, 9, 15)
SEQ_LEN, HELD_OUT, BATCH = 512, 16384, 8
METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "armor": ("armor", 16, {}),
    "armor, damping 0.001": ("armor", 16, {"damping": 0.001}),
    "armor, damping 0.01": ("armor", 16, {"damping": 0.01}),
    "sparsegpt": ("sparsegpt", 0, {}),
}


def joined(parts: list[InputStatistics]) -> InputStatistics:
    """The statistics of several texts as one."""
    tokens = sum(part.tokens for part in parts)
    gram: Tensor = sum((part.require_gram() * (part.tokens / tokens) for part in parts), torch.zeros(()))
    return InputStatistics(tokens, gram.diagonal().float(), gram)


def measure() -> dict[str, dict[str, list[float]]]:
    """By method and number of tokens: the mean error on calibration text and on held-out text."""
    dense = load_dense(str(smollm2_gguf()))
    texts = {"train": ("train_1MB.txt.gz", SIZES[-1]), "held-out": ("valid.jsonl.gz", HELD_OUT)}
    blockwise = BlockwiseModel(dense.model)
    hidden: dict[str, list[BlockInputs]] = {}
    for name, (file, tokens) in texts.items():
        path = str(DATA / "wikitext2" / file)
        ids = calibration_tokens(path, dense.model, dense.tokenizer, tokens // SEQ_LEN, SEQ_LEN, seed=0).ids
        hidden[name] = [blockwise.embed(batch) for batch in ids.split(BATCH)]
    linears, _ = find_linears(dense.model)
    errors: dict[str, dict[str, list[list[float]]]] = {}
    for index in range(BLOCKS[-1] + 1):
        names = [linear.name for linear in linears if linear.block == index and index in BLOCKS]
        parts: list[dict[str, InputStatistics]] = []
        for at in range(len(SIZES)) if names else []:
            first, last = (SIZES[at - 1] if at else 0) // (SEQ_LEN * BATCH), SIZES[at] // (SEQ_LEN * BATCH)
            found, _ = collect_block(blockwise, index, hidden["train"][first:last], names, Statistic.GRAM)
            parts.append(found)
            held_out, _ = collect_block(blockwise, index, hidden["held-out"], names, Statistic.GRAM)
            solve(dense.model, names, parts, held_out, SIZES[at], errors)
        hidden = {name: [blockwise.run_block(index, batch) for batch in batches] for name, batches in hidden.items()}
    return {
        method: {
            size: [sum(values) / len(values) for values in zip(*pairs, strict=True)] for size, pairs in sizes.items()
        }
        for method, sizes in errors.items()
    }


def solve(
    model: Any,
    names: list[str],
    parts: list[dict[str, InputStatistics]],
    held_out: dict[str, InputStatistics],
    size: int,
    errors: dict[str, dict[str, list[list[float]]]],
) -> None:
    """Every method on every linear of one block."""
    for name in names:
        weight: Tensor = model.get_submodule(name).weight.detach()
        seen = joined([part[name] for part in parts])
        for label, (method, block, options) in METHODS.items():
            spec = WeightSpec(weight.shape[0], weight.shape[1], Pattern(2, 4), "bf16", block, block)
            found = create(method, **options).compress(weight, seen, spec).weight.dense()
            pair = [relative_error(weight, found, statistics)[0] for statistics in (seen, held_out[name])]
            errors.setdefault(label, {}).setdefault(str(size), []).append(pair)
    print(size, names[0], {label: found[str(size)][-1] for label, found in errors.items()}, flush=True)


def report(errors: dict[str, dict[str, list[float]]]) -> str:
    """The section of RESULTS.md."""
    rows = [
        [label, *(f"{found[str(size)][0]:.4f} / {found[str(size)][1]:.4f}" for size in SIZES)]
        for label, found in errors.items()
    ]
    header = ["error on calibration text / on held-out text", *(f"{size // 1024}k tokens" for size in SIZES)]
    return (
        f"`python benchmarks/calibration_size.py`\n\n{table(header, rows)}\n\n"
        f"Mean relative output error of the {7 * len(BLOCKS)} linears of blocks {', '.join(map(str, BLOCKS))} of SmolLM2-135M, 2:4, block size 16; "
        "calibrated on WikiText-2 train, held-out text is 16k tokens of WikiText-2 valid."
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.fresh or not KEPT.exists():
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(measure(), indent=1) + "\n")
    write_section("calibration_size", report(json.loads(KEPT.read_text())))


if __name__ == "__main__":
    main()
