"""Quality and size of llama.cpp's own quantised files of a model, for comparison with ours: section `llama_types` of RESULTS.md.

    python benchmarks/llama_types.py off_grid                     every type, with and without an importance matrix
    python benchmarks/llama_types.py off_grid --only Q4_0 IQ4_XS

llama.cpp quantises through llama-cpp-python (`pip install llama-cpp-python`). The importance matrix is the mean square of every input of each
linear over the calibration text of our own rows (the same windows, benchmarks/quality_off_grid.yaml). Files are read back by dequantising them, and
judged in transformers on the texts and windows of our rows. Where the width of a matrix is not a multiple of 256, llama.cpp replaces the type; the
table names what is in the file. A type that is done is not measured again.
"""

import argparse
import ctypes
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import CACHE, ROOT, machine, table, write_section
from quality import MODELS, prepare

import halfplate
from halfplate import plain_yaml
from halfplate.calibration import calibration_tokens
from halfplate.checkpoint.folder import new_folder
from halfplate.checkpoint.write import write_model
from halfplate.cli.console import silence_libraries
from halfplate.models.gguf import load_model, read_header
from halfplate.models.gguf_families.table import family_of_model
from halfplate.models.gguf_families.tensors import names_in_file
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import load_dense
from halfplate.recipe import Recipe

# Numbers of `enum llama_ftype`.
TYPES = {
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "IQ4_NL": 25,
    "Q4_0": 2,
    "IQ4_XS": 30,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "IQ3_XXS": 23,
    "Q2_K": 10,
}
NEEDS_IMPORTANCE = ("IQ3_XXS",)
BATCH = 4  # windows of calibration text at a time


def importance(source: Path, folder: Path, base: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The mean square of the inputs of every linear, fp32 (d_in), by the name of its weight in the file."""
    kept = folder / "importance.pt"
    if kept.exists():
        found: dict[str, torch.Tensor] = torch.load(kept)
        return found
    loaded, recipe = load_dense(str(source)), Recipe()
    model, family = loaded.model.eval(), family_of_model(loaded.model.config.model_type)
    samples, seq_len = base.get("samples", recipe.samples), base.get("seq_len", recipe.seq_len)
    ids = calibration_tokens(base["calibration"], model, loaded.tokenizer, samples, seq_len, recipe.seed).ids
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0) + squares

        module.register_forward_pre_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            for stored in names_in_file(family, f"{name}.weight"):
                watch(stored, module)
    with torch.no_grad():
        for batch in ids.split(BATCH):
            model(batch)
    means = {name: total / ids.numel() for name, total in sums.items()}
    torch.save(means, kept)
    return means


def quantize(source: Path, out: Path, number: int, means: dict[str, torch.Tensor] | None) -> None:
    """Write the file `source` quantised by llama.cpp to `out`. number: of the type. means: the importance matrix, if any."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = torch.get_num_threads(), number
    arrays = []
    if means is not None:
        entry = llama_cpp.llama_cpp.llama_model_imatrix_data
        entries = (entry * (len(means) + 1))()  # the last one ends the list
        for place, (name, values) in zip(entries, means.items(), strict=False):
            arrays.append((ctypes.c_float * len(values))(*values.tolist()))
            place.name, place.size = name.encode(), len(values)
            place.data = ctypes.cast(arrays[-1], type(place.data))
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {out.name}")


def contents(file: Path) -> str:
    """The types of the matrices of a file with their share of all weights, such as `Q5_0 60 %, Q8_0 40 %`."""
    from gguf import GGMLQuantizationType

    weights: Counter[str] = Counter()
    for entry in read_header(file, file.name).contents.entries.values():
        if len(entry.shape) > 1:
            weights[GGMLQuantizationType(entry.kind).name] += entry.shape[0] * entry.shape[1]
    total = weights.total()
    return ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in weights.most_common())


def measured(name: str, with_importance: bool, source: Path, folder: Path, sweep: dict[str, Any]) -> dict[str, Any]:
    """Bytes, types and losses of one file, from an earlier call if it was made before."""
    kept = folder / f"{name}{' importance' if with_importance else ''}.json"
    if not kept.exists():
        dense, out = folder / "dense.gguf", folder / "quantized.gguf"
        loaded = load_dense(str(source))
        if not dense.exists():
            # Tokens come from the tokenizer of the original: llama.cpp does not know every tokenizer.
            write_gguf(loaded.model, None, dense, half=False)
        means = importance(source, folder, sweep["base"]) if with_importance else None
        quantize(dense, out, TYPES[name], means)
        model, _ = load_model(out, out.name, loaded.model.config)
        shutil.rmtree(folder / "read_back", ignore_errors=True)
        with new_folder(folder / "read_back", overwrite=False) as back:
            write_model(model, loaded.tokenizer, back, torch.float32, quantization=None)
        found = halfplate.evaluate(folder / "read_back", against=source, **sweep["eval"])
        texts = found.get("texts", {"text": found})  # without names if there is one
        row = {"nbytes": out.stat().st_size, "contents": contents(out), "texts": texts, "machine": machine()}
        out.unlink()
        kept.write_text(json.dumps(row))
    row_of_before: dict[str, Any] = json.loads(kept.read_text())
    return row_of_before


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--only", nargs="+", choices=TYPES, default=list(TYPES), metavar="TYPE")
    options = parser.parse_args()
    silence_libraries()
    texts, folder = CACHE / "quality", (CACHE / f"llama_{options.model}").resolve()
    prepare(options.model, texts)
    folder.mkdir(parents=True, exist_ok=True)
    sweep: Any = plain_yaml.read(str(ROOT / "benchmarks" / f"quality_{options.model}.yaml"))
    os.chdir(texts)  # sweep files name what is there
    rows, last = [], {}
    for with_importance in (True, False):
        for name in options.only:
            if with_importance or name not in NEEDS_IMPORTANCE:
                last = measured(name, with_importance, Path(MODELS[options.model][0]), folder, sweep)
                rows.append(_cells(name, with_importance, last))
                print(" | ".join(rows[-1]), flush=True)
    heads = [f"{text}: {what}" for text in last["texts"] for what in ("perplexity", "KL", "top-1")]
    header = ["type", "importance matrix", "file, MB", *heads, "matrices in the file"]
    what = f"`python benchmarks/llama_types.py {options.model}`; {last['machine'].partition(', load')[0]}."
    write_section(f"llama_types_{options.model}", f"{what}\n\n{table(header, rows)}")


def _cells(name: str, with_importance: bool, row: dict[str, Any]) -> list[str]:
    scores = [f"{score[key]:.4g}" for score in row["texts"].values() for key in ("perplexity", "kl", "top1_agreement")]
    return [name, "yes" if with_importance else "no", f"{row['nbytes'] / 1e6:.1f}", *scores, row["contents"]]


if __name__ == "__main__":
    main()
