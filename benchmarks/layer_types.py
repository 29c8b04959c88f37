"""One layer: output error of our solver and of llama.cpp's types, each matrix alone: section `layer_types` of RESULTS.md.

    python benchmarks/layer_types.py [--layer 12] [--only Q4_K ...]
    python benchmarks/layer_types.py --table     the section, from what is measured so far

Minutes instead of the hours of benchmarks/same_bytes.py. Model and texts are those of SmolLM2 off the grid; inputs are those of the original. Both sides
see the same calibration text: we its Gram matrix, llama.cpp its importance matrix, which is the diagonal. The error is tr(D H D') / tr(W H W'), with H
from text that neither has seen, averaged over the seven matrices by their share of the weights. Rows are padded by zeros to multiples of 256 for
llama.cpp; zeros at the end of a row do not change how we solve the rest.
"""

import argparse
import contextlib
import ctypes
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CACHE, machine, table, write_section
from gguf import GGMLQuantizationType, dequantize
from peers import _ggml
from quality import prepare
from same_bytes import settings
from torch import Tensor
from torch.nn import functional

from halfplate.calibration import calibration_tokens
from halfplate.calibration.documents import Text
from halfplate.cli.console import silence_libraries
from halfplate.evaluation import token_windows
from halfplate.formats.spec import WeightSpec
from halfplate.models.gguf_blocks import block_type
from halfplate.models.sources import load_dense
from halfplate.pattern import DENSE
from halfplate.recipe import Recipe
from halfplate.solvers.armor.full_gram import GramSchedule, solve_gram

WIDTH = 256
BATCH = 4
# llama.cpp's types, and what is measured beside each: a core and its columns per scale.
CORES = {
    "Q8_0": ("int8:32",),
    "Q6_K": ("int6k:16",),
    "Q5_K": ("affine5k:32", "nl5:32", "nl5k:32"),
    "Q4_K": ("affine4k:32", "nl4:32"),
    "Q4_0": ("int4:32",),
    "IQ4_XS": ("nl4s:32", "nl4k:32"),
    "Q3_K": ("int3k:16", "nl3k:32"),
    "IQ3_S": ("int3k:16", "nl3k:32"),
    "IQ3_XXS": ("nl3:128", "nl3k:64", "nl3k:128"),
    "Q2_K": ("affine2k:16",),
}


class _Reached(Exception):
    """The layer is done; the rest of the model need not run."""


def grams(model: Any, layer: int, windows: Tensor) -> dict[str, Tensor]:
    """The mean of x xᵀ over all tokens for each linear of a layer, fp64 (d_in, d_in)."""
    sums: dict[str, Tensor] = {}
    block, hooks = model.model.layers[layer], []

    def watch(name: str, linear: torch.nn.Linear) -> None:
        def add(_: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].reshape(-1, linear.in_features)
            sums[name] = sums.get(name, 0) + (x.T @ x).double()

        hooks.append(linear.register_forward_pre_hook(add))

    def stop(*_: Any) -> None:
        raise _Reached

    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name, module)
    hooks.append(block.register_forward_hook(stop))
    with torch.inference_mode():
        for batch in windows.split(BATCH):
            with contextlib.suppress(_Reached):
                model.model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total / windows.numel() for name, total in sums.items()}


def measured_inputs(layer: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights, Gram matrices of the calibration text, and of held-out text, by the names of the linears."""
    kept = folder / f"layer_{layer}.pt"
    if not kept.exists():
        base, recipe = settings()["base"], Recipe()
        loaded = load_dense("SmolLM2-off-grid")
        model = loaded.model.eval()
        ids = calibration_tokens(
            base["calibration"], model, loaded.tokenizer, recipe.samples, recipe.seq_len, recipe.seed
        ).ids
        held_out = token_windows(loaded.tokenizer, Text("wikitext2_valid.jsonl.gz", "text"), 512, 16)
        linears = {
            name: module
            for name, module in model.model.layers[layer].named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        weights = {name: linear.weight.detach().float() for name, linear in linears.items()}
        torch.save((weights, grams(model, layer, ids), grams(model, layer, held_out)), kept)
    found: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]] = torch.load(kept)
    return found


def by_llama(weight: Tensor, importance: Tensor, kind: str) -> Tensor:
    """`weight` as llama.cpp quantises it, with the mean squares of its inputs."""
    columns = weight.shape[1]
    wide = functional.pad(weight, (0, -columns % WIDTH)).contiguous().numpy()
    means = np.ascontiguousarray(functional.pad(importance.float(), (0, -columns % WIDTH)).numpy())
    number = GGMLQuantizationType[kind]
    out = np.zeros(wide.size * 4, np.uint8)
    ggml = _ggml()
    ggml.call("ggml_quantize_init", None, ctypes.c_int(number))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (wide, out, means)]
    rows = (ctypes.c_int64(0), ctypes.c_int64(wide.shape[0]), ctypes.c_int64(wide.shape[1]))
    size = ggml.call("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(number), *pointers[:2], *rows, pointers[2])
    values = dequantize(out[:size].reshape(wide.shape[0], -1), number)
    return torch.from_numpy(np.ascontiguousarray(values[:, :columns]))


def by_us(weight: Tensor, gram: Tensor, core: str) -> Tensor:
    """`weight` as ARMOR without wrappers solves it for the type `core`."""
    core_dtype, _, group = core.partition(":")
    spec = WeightSpec(*weight.shape, DENSE, core_dtype, 0, 0, "bf16", group=int(group))
    chain, _ = solve_gram(weight, gram, spec, GramSchedule())
    return chain.to_dense() if hasattr(chain, "to_dense") else chain.dense()


def error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """tr(D H D') / tr(W H W')."""
    whole, lost = weight.double(), weight.double() - found.double()
    return float(((lost @ gram) * lost).sum() / ((whole @ gram) * whole).sum())


def _record(layer: int, folder: Path, how: str) -> Path:
    return folder / f"layer_{layer}_{how.replace(':', '_')}.json"


def mean_error(layer: int, folder: Path, how: str, llama: bool) -> float:
    """The mean over the matrices of the layer, kept in `folder`."""
    kept = _record(layer, folder, how)
    if not kept.exists():
        weights, seen, unseen = measured_inputs(layer, folder)
        total = sum(weight.numel() for weight in weights.values())
        parts = {}
        for name, weight in weights.items():
            found = by_llama(weight, seen[name].diagonal(), how) if llama else by_us(weight, seen[name], how)
            parts[name] = error(weight, found, unseen[name]) * weight.numel() / total
        kept.write_text(json.dumps({"parts": parts, "mean": sum(parts.values()), "machine": machine()}))
        print(f"{how}: {sum(parts.values()):.6f}", flush=True)
    mean: float = json.loads(kept.read_text())["mean"]
    return mean


def _bits(core: str) -> str:
    """Bits per weight of a core of ours, in a wide row, and the type of a GGUF file that holds it in no more."""
    core_dtype, _, group = core.partition(":")
    spec = WeightSpec(256, 1536, DENSE, core_dtype, group=int(group))
    kind, bits = block_type(spec), 8 * spec.nbytes / (256 * 1536)
    return f"{bits:.3f}" if kind is None or kind.bits > bits + 0.2 else f"{kind.bits:g}, as {kind.name}"


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=CORES, default=list(CORES), metavar="TYPE")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    silence_libraries()
    folder = (CACHE / "layer_types").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare("off_grid", CACHE / "quality")
    os.chdir(CACHE / "quality")
    from gguf import GGML_QUANT_SIZES

    rows = []
    for kind in options.only:
        theirs = mean_error(options.layer, folder, kind, llama=True)
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        rows.append([f"llama.cpp {kind}", f"{8 * size / values:g}", f"{theirs:.3g}", ""])
        for core in CORES[kind]:
            if options.table and not _record(options.layer, folder, core).exists():
                continue
            ours = mean_error(options.layer, folder, core, llama=False)
            rows.append(
                [
                    f"`{core.partition(':')[0]}`, {core.partition(':')[2]} columns",
                    _bits(core),
                    f"{ours:.3g}",
                    f"{ours / theirs:.2f}",
                ]
            )
    header = ["type", "bits per weight", "relative output error", "of llama.cpp's"]
    what = f"`python benchmarks/layer_types.py --layer {options.layer}`; {machine().partition(', load')[0]}."
    write_section("layer_types", f"{what}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
