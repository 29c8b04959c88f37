"""KL at the bytes of llama.cpp's types, on a model whose widths are multiples of 256: section `same_bytes` of RESULTS.md.

    python benchmarks/same_bytes.py llama [--only Q4_K_M ...]     llama.cpp's files, each with an importance matrix
    python benchmarks/same_bytes.py ours [--only ROW ...]         ours; `--list` names the rows
    python benchmarks/same_bytes.py table

The model is SmolLM2 off the grid (benchmarks/off_grid.py), made wide (benchmarks/wide.py). Calibration text, samples and windows are those of
benchmarks/quality_off_grid.yaml on both sides. A row `exact TYPE` gives every matrix the type that it has in llama.cpp's file (read from it, with
`--types`), is exported as such a file, and the codes and scales of both are compared value for value by the export. A row in formats of our own is
kept within the bytes of llama.cpp's file. To be faster, models are made narrow again before they are measured, which leaves their function as it
is, and logits of the original are kept on disk. A row that is done is not measured again, so either call goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CACHE, ROOT, machine, table, write_section
from llama_types import TYPES, importance, quantize
from quality import prepare
from transformers import AutoConfig, AutoTokenizer
from wide import make_wide, narrowed

from halfplate import plain_yaml
from halfplate.calibration.documents import Text
from halfplate.checkpoint.read import load
from halfplate.cli.console import silence_libraries
from halfplate.evaluation.perplexity import compare, token_windows
from halfplate.models.gguf import load_model, read_header
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.sources import load_dense

FOLDER = (CACHE / "same_bytes").resolve()
NARROW = (CACHE / "off_grid").resolve()
MODEL = (CACHE / "wide").resolve()
LLAMA = ("Q4_K_M", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ4_XS", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0", "Q4_K_S", "Q3_K_S")
# What a matrix of a type in llama.cpp's file becomes in ours: a type that the file holds exactly, with the columns that share a scale there.
CORES = {
    "Q2_K": "affine2k:16",
    "Q3_K": "int3k:16",
    "IQ4_XS": "nl4s:32",
    "IQ4_NL": "nl4:32",
    "Q4_0": "int4:32",
    "Q4_1": "affine4:32",
    "Q4_K": "affine4k:32",
    "Q5_K": "affine5k:32",
    "Q6_K": "int6k:16",
    "Q8_0": "int8:32",
}
EXACT = ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0")


def _of(core: str, embedding: str, **types: str) -> dict[str, Any]:
    """Recipe fields for the cores `core` and, by the first letters of the linears, `types`; groups of 32 unless they say otherwise."""
    found = [f"*.{part}_proj={kind}" for part, kind in types.items()]
    core_dtype, colon, _ = core.partition(":")
    found += [f"*.layers.*={core}"] if colon else []
    return {"core_dtype": core_dtype, "group_size": 32, "types": found, "embedding_dtype": embedding}


# Rows of our own formats: the file of llama.cpp whose bytes they keep within, and what is compressed. Types beside `core_dtype` by name.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "nl4; nl5 in v, up, down and embedding": ("Q4_K_M", _of("nl4", "nl5", v="nl5", up="nl5", down="nl5")),
    "nl4k; nl5k in v, up, down; int6k embedding": ("Q4_K_M", _of("nl4k", "int6k", v="nl5k", up="nl5k", down="nl5k")),
    "nl4; nl3 in q, gate; nl5 embedding": ("Q3_K_M", _of("nl4", "nl5", q="nl3:64", gate="nl3:64")),
    "nl4k; nl3k in q; nl5k embedding": ("Q3_K_M", _of("nl4k", "nl5k", q="nl3k")),
    "nl3 in groups of 64; nl4 embedding": ("IQ3_XXS", _of("nl3:64", "nl4")),
    "nl3 in groups of 128; nl4 in v; nl5 embedding": ("Q2_K", _of("nl3:128", "nl5", v="nl4")),
    "nl3k; nl5k embedding": ("Q2_K", _of("nl3k:32", "nl5k")),
    "nl4; nl5 embedding": ("IQ4_XS", _of("nl4", "nl5")),
    "nl4k; nl5k in v, down and embedding": ("IQ4_XS", _of("nl4k", "nl5k", v="nl5k", down="nl5k")),
    "nl4; nl5 in down and embedding": ("Q4_0", _of("nl4", "nl5", down="nl5")),
    "nl5; int6 in v, k and embedding": ("Q5_K_M", _of("nl5", "int6", v="int6", k="int6")),
}


def settings() -> dict[str, Any]:
    """The sweep file whose `base` and `eval` hold for every row."""
    found: dict[str, Any] = plain_yaml.read(str(ROOT / "benchmarks" / "quality_off_grid.yaml"))
    return found


def original_logits(name: str) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """The windows of a text (windows, L) and the original's logits (windows, L - 1, vocabulary), fp32, from disk."""
    of = settings()["eval"]
    kept, done = FOLDER / f"{name}.npy", FOLDER / f"{name}.done"
    loaded = load_dense(str(NARROW)) if not done.exists() else None
    tokenizer = AutoTokenizer.from_pretrained(NARROW)
    windows = token_windows(tokenizer, Text(f"{name}.jsonl.gz", "text"), of["seq_len"], of["windows"])
    if loaded is not None:
        shape = (len(windows), of["seq_len"] - 1, loaded.model.config.vocab_size)
        logits = np.lib.format.open_memmap(kept, "w+", np.float32, shape)
        with torch.inference_mode():
            for place, window in enumerate(windows):
                logits[place] = loaded.model(input_ids=window[None], use_cache=False).logits[0, :-1].float().numpy()
        logits.flush()
        done.touch()
    return windows, np.load(kept, mmap_mode="r")


@torch.inference_mode()
def scores(wide: Any) -> dict[str, dict[str, float]]:
    """Perplexity, KL and top-1 agreement of `wide` on each text."""
    model, found = narrowed(wide, AutoConfig.from_pretrained(NARROW)), {}
    for file in settings()["eval"]["text"]:
        name = file.partition(".")[0]
        windows, dense = original_logits(name)
        parts = []
        for window, of_original in zip(windows, dense, strict=True):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            parts.append(compare(logits, torch.from_numpy(np.array(of_original)), window[1:]))
        means = {key: float(np.mean([part[key] for part in parts])) for key in ("kl", "top1_agreement")}
        found[name] = means | {"perplexity": float(np.exp(np.mean([np.log(part["perplexity"]) for part in parts])))}
    return found


def types_in_file(file: Path) -> dict[str, str]:
    """The type of every matrix of a GGUF file, by its name there."""
    from gguf import GGMLQuantizationType

    entries = read_header(file, file.name).contents.entries
    return {key: GGMLQuantizationType(entry.kind).name for key, entry in entries.items() if len(entry.shape) > 1}


def llama_row(name: str) -> dict[str, Any]:
    """Quantise by llama.cpp, read the file back, and measure."""
    dense, out = FOLDER / "dense.gguf", FOLDER / f"{name}.gguf"
    config = load_dense(str(MODEL)).model.config
    if not dense.exists():
        write_gguf(load_dense(str(MODEL)).model, None, dense, half=False)
    means = importance(MODEL, FOLDER, settings()["base"])
    started = time.perf_counter()
    quantize(dense, out, TYPES[name], means)
    seconds = time.perf_counter() - started
    model, _ = load_model(out, out.name, config)
    row = {"nbytes": out.stat().st_size, "types": types_in_file(out), "seconds": seconds, "texts": scores(model)}
    out.unlink()
    return row


def exact_types(name: str) -> dict[str, Any]:
    """Recipe fields that give every matrix the type that it has in llama.cpp's file `name`."""
    of_file: dict[str, str] = json.loads((FOLDER / f"llama {name}.json").read_text())["types"]
    cores = {key: CORES[kind] for key, kind in of_file.items()}
    most = max(set(cores.values()), key=list(cores.values()).count)
    ours = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
    ours |= {f"ffn_{part}": f"{part}_proj" for part in ("gate", "up", "down")}
    by_part: dict[tuple[str, str], list[str]] = {}
    for key, core in cores.items():
        if key.startswith("blk."):
            _, layer, part, _ = key.split(".")
            by_part.setdefault((ours[part], core), []).append(layer)
    layers = 1 + max(int(layer) for found in by_part.values() for layer in found)
    types = []
    for (part, core), found in by_part.items():
        if core != most:
            pattern = "*" if len(found) == layers else None
            types += [f"*.layers.{layer}.*{part}={core}" for layer in ([pattern] if pattern else found)]
    core, _, group = most.partition(":")
    return {
        "core_dtype": core,
        "group_size": int(group),
        "types": types,
        "embedding_dtype": cores["token_embd.weight"].partition(":")[0],
    }


def our_row(name: str) -> dict[str, Any]:
    """Compress, export if the row is an exact one, and measure."""
    exact = name.removeprefix("exact ") if name.startswith("exact ") else None
    fields = settings()["base"] | (exact_types(exact) if exact else OWN[name][1])
    out, log = FOLDER / "checkpoints" / name.replace(" ", "_").replace(",", ""), FOLDER / f"ours {name}.log"
    out.parent.mkdir(exist_ok=True)
    started = time.perf_counter()
    if not (out / "config.json").exists():
        _run(
            ["compress", str(MODEL), "-o", str(out), "--resume", "--no-check", "--no-benchmark", *_options(fields)], log
        )
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "options": " ".join(_options(fields))}
    model: Any = load(out, torch.float32, kernels=False)
    row["nbytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    row["texts"] = scores(model.dequantize(dtype=torch.float32))
    del model
    if exact:
        file = FOLDER / f"exact_{exact}.gguf"
        export = ["export", str(out), "--format", "gguf", "-o", str(file), "--overwrite"]
        text = "The town lies on a river, and its harbour was the largest of the coast until the railway came."
        row["export"] = _run([*export, "--verify-logits", text], log)
        row |= {"nbytes": file.stat().st_size, "types": types_in_file(file)}
        file.unlink()
    return row


def _options(fields: dict[str, Any]) -> list[str]:
    found = []
    for key, value in fields.items():
        for entry in value if isinstance(value, list) else [value]:
            found += [f"--{key.replace('_', '-')}", str(entry)]
    return found


def _run(arguments: list[str], log: Path) -> str:
    """Run a command of halfplate, with its output added to `log`; returns the last line of its standard output."""
    with log.open("a") as to:
        done = subprocess.run(
            [sys.executable, "-m", "halfplate", *arguments], stdout=subprocess.PIPE, stderr=to, text=True
        )
        to.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"`halfplate {arguments[0]}` failed; see {log}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def measured(prefix: str, name: str) -> None:
    """Measure one row unless it is done."""
    kept = FOLDER / f"{prefix} {name}.json"
    if not kept.exists():
        row = llama_row(name) if prefix == "llama" else our_row(name)
        kept.write_text(json.dumps(row | {"machine": machine()}, indent=1))
        print(f"{kept.stem}: {row['nbytes'] / 1e6:.1f} MB, {row['texts']}", flush=True)


def _cells(prefix: str, name: str, of: dict[str, Any] | None) -> list[str]:
    row = json.loads((FOLDER / f"{prefix} {name}.json").read_text())
    cells = [f"llama.cpp {name}" if prefix == "llama" else name, f"{row['nbytes'] / 1e6:.1f}"]
    for text, score in row["texts"].items():
        ratio = "" if of is None else f"{score['kl'] / of['texts'][text]['kl']:.2f}"
        cells += [f"{score['perplexity']:.4g}", f"{score['kl']:.4g}", f"{score['top1_agreement']:.3f}", ratio]
    return [*cells, f"{row['seconds']:.0f}"]


def write_table() -> None:
    """Write the section from what is measured."""
    rows = []
    for name in LLAMA:
        if not (FOLDER / f"llama {name}.json").exists():
            continue
        theirs = json.loads((FOLDER / f"llama {name}.json").read_text())
        rows.append(_cells("llama", name, None))
        own = [f"exact {name}"] + [row for row, (of, _) in OWN.items() if of == name]
        rows += [_cells("ours", row, theirs) for row in own if (FOLDER / f"ours {row}.json").exists()]
    heads = [
        f"{text}: {what}" for text in theirs["texts"] for what in ("perplexity", "KL", "top-1", "KL, of llama.cpp's")
    ]
    header = ["file", "MB", *heads, "seconds to make"]
    what = f"`python benchmarks/same_bytes.py table`; {machine().partition(', load')[0]}."
    write_section("same_bytes", f"{what}\n\n{table(header, rows)}")


def main() -> None:
    """Measure some rows, or write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("llama", "ours", "table"))
    parser.add_argument("--only", nargs="+", default=None, metavar="ROW")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and do nothing")
    options = parser.parse_args()
    ours = (f"exact {name}" for name in EXACT), OWN
    names = LLAMA if options.what == "llama" else [name for some in ours for name in some]
    if options.list:
        print("\n".join(names))
        return
    silence_libraries()
    if options.what == "table":
        write_table()
        return
    if not MODEL.exists():
        make_wide(str(NARROW), MODEL)
    FOLDER.mkdir(parents=True, exist_ok=True)
    prepare("off_grid", CACHE / "quality")
    os.chdir(CACHE / "quality")  # the settings name what is there
    for name in options.only or names:
        measured(options.what, name)
    shutil.rmtree(FOLDER / "read_back", ignore_errors=True)


if __name__ == "__main__":
    main()
