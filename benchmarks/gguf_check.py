"""Import from and export to GGUF against llama.cpp itself: worst difference of logits on a tiny model of every family.

python benchmarks/gguf_check.py                    # a table for RESULTS.md
python benchmarks/gguf_check.py --store tests/models/gguf_logits.json   # logits of llama.cpp for tests without it
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf_cases import CASES, KEPT, LENGTH, Case, build, digest, logits, text
from llama_cpp_model import library

from halfplate.models import gguf
from halfplate.models.gguf_writer import write_gguf


def llama_logits(path: Path) -> np.ndarray[Any, Any]:
    """Of llama.cpp, (tokens, vocabulary), with a cache in fp32 and attention in plain products."""
    llama = library()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False  # as in llama_cpp_model
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {path}")
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = LENGTH
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # GGML_TYPE_F32
    options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    state = llama.llama_init_from_model(model, options)
    ids = text()
    batch = llama.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        if failed := llama.llama_decode(state, batch):
            raise RuntimeError(f"llama.cpp cannot read the text: it failed with {failed}")
        size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama.llama_get_logits(state), (len(ids), size)).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(state)
        llama.llama_model_free(model)


def check(case: Case, folder: Path) -> dict[str, Any]:
    """Worst differences of logits, over the largest logit of the model.

    export: our file in llama.cpp against the model, F32 and F16. import: our reading of the file against llama.cpp.
    """
    model = build(case)
    wanted = logits(model)
    largest = float(np.abs(wanted).max())
    row: dict[str, Any] = {"case": case.name, "model": case.model_type}
    for kind, half in (("f32", False), ("f16", True)):
        path = folder / f"{kind}.gguf"
        write_gguf(model, None, path, half=half)
        theirs = llama_logits(path)
        config = gguf.read_config(path, path.name)
        read, report = gguf.load_model(path, path.name, config)
        if report["missing_keys"] or report["mismatched_keys"]:
            raise RuntimeError(f"{case.name}: {report}")
        row[f"export_{kind}"] = float(np.abs(theirs - wanted).max()) / largest
        row[f"import_{kind}"] = float(np.abs(logits(read) - theirs).max()) / largest
        if not half:
            row["digest"], row["logits"] = digest(path), theirs[list(KEPT)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--store", type=Path, help="write llama.cpp's logits to this file")
    args = parser.parse_args()
    rows = []
    print("| family | model of transformers | import | export | import, F16 | export, F16 |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in (one for one in CASES if args.only in one.name):
            row = check(case, Path(folder))
            rows.append(row)
            figures = (row[f"{way}_{kind}"] for kind in ("f32", "f16") for way in ("import", "export"))
            print(
                f"| {row['case']} | {row['model']} | " + " | ".join(f"{one:.1e}" for one in figures) + " |", flush=True
            )
    if args.store:
        stored = {
            row["case"]: {
                "digest": row["digest"],
                "logits": [[float(f"{value:.6g}") for value in one] for one in row["logits"]],
            }
            for row in rows
        }
        args.store.write_text(json.dumps(stored, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
