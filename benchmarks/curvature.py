"""Two-sided curvature for rivals on stories260K: KL with and without the second moments of the gradients of the outputs.

    python benchmarks/curvature.py [--damping 1 0.1]

The loss is tr(G (W - W') H (W - W')ᵀ) instead of tr((W - W') H (W - W')ᵀ): H the second moments of the inputs, G those of the gradients
of the outputs, by token, for labels drawn from the model itself. Rows are solved one after the other by the method as it is, each moved
by what G lets it make up for the errors of the rows before it: for a Kronecker product, that is GPTQ's rule over rows (YAQA, arXiv
2505.22988). Inputs are those of the original model in both cases. Section `curvature` of RESULTS.md.
"""

import argparse
import os
from typing import Any

import torch
from common import CACHE, machine, table, write_section
from quality import prepare
from torch import Tensor, nn

from halfplate.calibration import calibration_tokens, read_text
from halfplate.cli.console import silence_libraries
from halfplate.evaluation import evaluate, token_windows
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe
from halfplate.statistics import InputStatistics

MODEL, SAMPLES, SEQ_LEN, WINDOWS = "stories260K", 64, 256, 16
RIVALS: dict[str, dict[str, Any]] = {
    "rtn int3": {"method": "rtn", "core_dtype": "int3", "group_size": 32, "pattern": "dense"},
    "gptq int3": {"method": "gptq", "core_dtype": "int3", "group_size": 32, "pattern": "dense"},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
}


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """The linears of the layers by name."""
    return {
        name: module for name, module in model.named_modules() if ".layers." in name and isinstance(module, nn.Linear)
    }


def moments(model: Any, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments of the inputs and of the gradients of the outputs of every linear, fp64 (d_in, d_in) and (d_out, d_out)."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], name: str, found: Tensor) -> None:
        rows = found.detach().flatten(0, 1).double()
        sums[name] = sums.get(name, 0) + rows.T @ rows / ids.numel()

    def watch(name: str, module: nn.Linear) -> None:
        module.register_forward_pre_hook(lambda _, args: add(inputs, name, args[0]))
        module.register_full_backward_hook(lambda _, __, grads: add(outputs, name, grads[0]))

    for name, module in linears_of(model).items():
        watch(name, module)
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(True)
    for batch in ids.split(8):
        logits = model(batch, use_cache=False).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return inputs, outputs


def solved(weight: Tensor, gram: Tensor, output: Tensor | None, fields: dict[str, Any], damping: float) -> Tensor:
    """The matrix that a rival makes of `weight` (d_out, d_in), dense. output: G, None for one-sided curvature."""
    recipe = Recipe(**fields)
    method, statistics = recipe.create_method(), InputStatistics(SAMPLES * SEQ_LEN, gram.diagonal().float(), gram)
    if output is None:
        spec = recipe.spec(*weight.shape, 0)
        return method.compress(weight, statistics, spec).weight.dense()
    damped = output + damping * output.diagonal().mean() * torch.eye(len(output), dtype=torch.float64)
    # Row i of the upper factor of G⁻¹ says how later rows make up for an error of row i, as in GPTQ over columns.
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left, rows = weight.double().clone(), []
    spec = recipe.spec(1, weight.shape[1], 0)
    for index in range(len(weight)):
        wanted = left[index].float()
        rows.append(method.compress(wanted[None], statistics, spec).weight.dense()[0])
        error = (wanted - rows[-1]).double() / upper[index, index]
        left[index + 1 :] -= upper[index, index + 1 :, None] * error
    return torch.stack(rows)


def loss(weight: Tensor, made: Tensor, gram: Tensor, output: Tensor) -> float:
    """tr(G Δ H Δᵀ)."""
    delta = (weight - made).double()
    return float(((output @ delta @ gram) * delta).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damping", type=float, nargs="+", default=[1.0, 0.1])
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    prepare(MODEL, CACHE / "quality")
    os.chdir(CACHE / "quality")
    dense, changed = load_dense(MODEL), load_dense(MODEL).model
    watched = load_dense(MODEL)
    ids = calibration_tokens("tinystories_calibration.jsonl.gz", dense.model, dense.tokenizer, SAMPLES, SEQ_LEN, 0).ids
    inputs, outputs = moments(watched.model, ids)
    documents = read_text("tinystories_held_out.jsonl.gz")
    windows = token_windows(dense.tokenizer, documents, seq_len=SEQ_LEN, windows=WINDOWS)
    lines = []
    for name, fields in RIVALS.items():
        first, base = 0.0, 0.0
        for damping in (None, *options.damping):
            total = 0.0
            for linear, module in linears_of(dense.model).items():
                gram, output = inputs[linear], outputs[linear]
                made = solved(module.weight.detach(), gram, None if damping is None else output, fields, damping or 0)
                total += loss(module.weight.detach(), made, gram, output)
                changed.get_submodule(linear).weight.data.copy_(made)
            kl = evaluate(changed, windows, dense.model)["kl"]
            first, base = (total, kl) if damping is None else (first, base)
            how = "inputs alone" if damping is None else f"both sides, damping {damping:g}"
            lines.append([name, how, f"{total / first:.2f}", f"{kl:.3f}", f"{kl / base:.2f}"])
            print(" | ".join(lines[-1]), flush=True)
    header = ["rival", "curvature", "two-sided loss, relative", "KL", "relative"]
    what = f"`python benchmarks/curvature.py`: {MODEL}, {SAMPLES} sequences of {SEQ_LEN} tokens, {WINDOWS} held-out windows; {machine()}."
    write_section("curvature", f"{what}\n\n{table(header, lines)}")


if __name__ == "__main__":
    main()
