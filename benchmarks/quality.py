"""Every method on SmolLM2-135M in one table: bytes, layer error, perplexity, KL and agreement.

    python benchmarks/quality.py

Each method sees the same statistics of the dense model, once from WikiText-2 train text and once from text that the model
sampled itself (64 samples of 512 tokens), and is judged on the first 16 windows of 1,024 tokens of WikiText-2 test. The
layer error is tr(D H Dᵀ) / tr(W H Wᵀ) with the Gram matrix H of the calibration tokens, whatever the method knew of it.
Rows are kept in benchmarks/cache; `--fresh` measures them again. About 40 minutes on two quiet cores.
"""

import argparse
import json
import math
import time
from typing import Any

import torch
from common import CACHE, DATA, machine, smollm2_gguf, table, write_section
from torch import Tensor
from transformers import PreTrainedModel

from halfplate.calibration import calibration_tokens, collect_block, read_text
from halfplate.checkpoint.write import round_others
from halfplate.evaluation.perplexity import evaluate, token_windows
from halfplate.execution.matrix import relative_error
from halfplate.formats import CompressedLinear, WeightSpec
from halfplate.methods import create
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.linears import FoundLinear, find_linears, replace_linear
from halfplate.models.sources import LoadedModel, load_dense
from halfplate.pattern import Pattern
from halfplate.statistics import InputStatistics, Statistic

SOURCES = {"wikitext2 train": str(DATA / "wikitext2" / "train_1MB.txt.gz"), "self": "self"}
PROTOTYPE_WINDOWS = 12
ROWS: list[tuple[str, int, dict[str, Any]]] = [
    ("magnitude", 0, {}),
    ("wanda", 0, {}),
    ("ria", 0, {}),
    ("nowag", 0, {}),
    ("sparsegpt", 0, {}),
    *(("armor", block, {"objective": "diag"}) for block in (8, 16, 32, 64)),
    ("armor", 16, {"objective": "diag", "iterations": 20}),
    *(("armor", block, {"objective": "gram"}) for block in (8, 16, 32, 64)),
]


def key_of(source: str, name: str, block: int, options: dict[str, Any]) -> str:
    """Where a row is kept in the cache."""
    return "/".join([source, name, str(block), *(f"{option}={value}" for option, value in options.items())])


def collect(dense: LoadedModel, source: str, linears: list[FoundLinear]) -> dict[str, InputStatistics]:
    """Gram matrices of the inputs of every linear, from the dense model."""
    tokens = calibration_tokens(source, dense.model, dense.tokenizer, samples=64, seq_len=512, seed=0)
    blockwise = BlockwiseModel(dense.model)
    inputs = [blockwise.embed(batch) for batch in tokens.ids.split(8)]
    found: dict[str, InputStatistics] = {}
    for index in range(len(blockwise.blocks)):
        names = [linear.name for linear in linears if linear.block == index]
        statistics, inputs = collect_block(blockwise, index, inputs, names, Statistic.GRAM)
        found |= statistics
    return found


class Remembered:
    """The dense model, which answers each batch of windows once: 16 windows of logits are 3.2 GB."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.answers: dict[bytes, Any] = {}

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.answers:
            self.answers[key] = self.model(input_ids=input_ids, use_cache=use_cache)
        return self.answers[key]


class Bench:
    """The dense model, a copy whose linears are replaced row by row, and the windows both are judged on."""

    def __init__(self) -> None:
        path = str(smollm2_gguf())
        self.dense, self.compressed = load_dense(path), load_dense(path)
        round_others(self.compressed.model, self.compressed.source.other_dtype)
        self.linears, _ = find_linears(self.dense.model)
        documents = read_text(str(DATA / "wikitext2" / "test.jsonl.gz"))
        self.reference: Any = Remembered(self.dense.model)
        self.windows = token_windows(self.dense.tokenizer, documents, seq_len=1024, windows=16)

    def row(
        self, name: str, block: int, options: dict[str, Any], statistics: dict[str, InputStatistics]
    ) -> dict[str, Any]:
        """Compress every linear with one method and judge the result."""
        method = create(name, **options)
        errors, nbytes, rises, above, seconds = [], 0, 0, 0, 0.0
        for linear in self.linears:
            weight: Tensor = self.dense.model.get_submodule(linear.name).weight
            spec = WeightSpec(linear.d_out, linear.d_in, Pattern(2, 4), "bf16", block, block)
            start = time.perf_counter()
            solution = method.compress(weight, statistics[linear.name], spec)
            seconds += time.perf_counter() - start
            errors.append(relative_error(weight, solution.weight.dense(), statistics[linear.name])[0])
            nbytes += solution.weight.nbytes
            rises += any(
                later > earlier * (1 + 1e-6)
                for earlier, later in zip(solution.losses, solution.losses[1:], strict=False)
            )
            above += bool(solution.losses) and solution.losses[-1] > solution.losses[0]
            replace_linear(
                self.compressed.model, linear.name, CompressedLinear.from_weight(solution.weight, spec, None)
            )
        dense_nbytes = sum(2 * linear.d_out * linear.d_in for linear in self.linears)
        return self.judge() | {
            "nbytes": nbytes,
            "share": nbytes / dense_nbytes,
            "mean_error": sum(errors) / len(errors),
            "seconds": seconds,
            "rises": rises,
            "above_start": above,
            "matrices": len(self.linears),
        }

    def judge(self) -> dict[str, float]:
        """Measures over the 16 windows, and the perplexity over the first 12, which the prototype was judged on."""
        first, rest = (
            evaluate(self.compressed.model, part, self.reference)
            for part in (self.windows[:PROTOTYPE_WINDOWS], self.windows[PROTOTYPE_WINDOWS:])
        )
        share = first["tokens"] / (first["tokens"] + rest["tokens"])
        whole = {key: share * first[key] + (1 - share) * rest[key] for key in ("kl", "top1_agreement")}
        for key in ("perplexity", "dense_perplexity"):
            whole[key] = math.exp(share * math.log(first[key]) + (1 - share) * math.log(rest[key]))
            whole[f"{key}_12"] = first[key]
        return whole


def report(results: dict[str, dict[str, Any]], where: str) -> str:
    """The section of RESULTS.md."""
    rows = []
    for key, r in results.items():
        source, name, block, *options = key.split("/")
        label = ", ".join([name, f"block {block}", *options]).replace("=", " ") if name == "armor" else name
        rows.append(
            [
                label,
                source,
                f"{r['nbytes'] / 1e6:.1f} MB",
                f"{r['share']:.3f}",
                f"{r['mean_error']:.4f}",
                f"{r['perplexity']:.2f}",
                f"{r['perplexity_12']:.2f}",
                f"{r['kl']:.3f}",
                f"{r['top1_agreement']:.3f}",
                f"{r['seconds']:.0f}",
            ]
        )
    first = next(iter(results.values()))
    rows.insert(
        0,
        [
            "dense",
            "",
            "212.3 MB",
            "1.000",
            "0",
            f"{first['dense_perplexity']:.2f}",
            f"{first['dense_perplexity_12']:.2f}",
            "0",
            "1",
            "",
        ],
    )
    header = ["method", "calibrated on", "linears", "of dense bf16", "mean layer error"]
    header += ["perplexity", "first 12 windows", "KL", "top-1 agreement", "solve s"]
    armor = [r for key, r in results.items() if "/armor/" in key]
    return (
        f"`python benchmarks/quality.py` · {where}\n\n{table(header, rows)}\n\n"
        "WikiText-2 test, first 16 windows of 1,024 tokens, no start token; bf16 cores and wrappers, computed in fp32. KL is "
        "KL(dense ‖ compressed) in nats a token. The layer error is the true output error under the Gram matrix of the "
        "calibration tokens. SmolLM2-135M-Instruct comes from a Q4_1 file, so the dense row already lies on a 4-bit grid.\n\n"
        f"Of {sum(r['matrices'] for r in armor)} ARMOR solves, {sum(r['rises'] for r in armor)} had a loss that rose between "
        f"iterations and {sum(r['above_start'] for r in armor)} ended above NoWag-P's."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--dry", action="store_true", help="print the section instead of writing RESULTS.md")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    cached = CACHE / "quality.json"
    results: dict[str, dict[str, Any]] = {}
    if cached.exists() and not options.fresh:
        results = json.loads(cached.read_text())
    where, bench = machine(), None
    with torch.no_grad():
        for source, text in SOURCES.items():
            missing = [row for row in ROWS if key_of(source, *row) not in results]
            if not missing:
                continue
            bench = bench or Bench()
            statistics = collect(bench.dense, text, bench.linears)
            for name, block, method_options in missing:
                key = key_of(source, name, block, method_options)
                results[key] = bench.row(name, block, method_options, statistics)
                cached.write_text(json.dumps(results))
                print(key, results[key], flush=True)
    section = report(results, where)
    if options.dry:
        print(section)
    else:
        write_section("quality", section)


if __name__ == "__main__":
    main()
