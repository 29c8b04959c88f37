"""Import from and export to GGUF against llama.cpp itself: logits of a tiny model of every family, tokens of every kind of tokenizer.

python tests/stress/gguf_check.py                              # the section of RESULTS.md
python tests/stress/gguf_check.py --only phi3                  # some cases, printed
python tests/stress/gguf_check.py --store tests/models/data    # what llama.cpp said, for tests without it
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESULTS, machine, table, write_section
from gguf_cases import CASES, KEPT, LENGTH, Case, build, digest, logits, text
from gguf_tokenizer_cases import CASES as TOKENIZERS
from gguf_tokenizer_cases import TokenizerCase, kept_tokens, write
from gguf_tokenizer_cases import digest as tokenizer_digest
from llama_cpp_model import library, tokens, version

from halfplate.models import gguf
from halfplate.models.gguf_families.table import FAMILIES
from halfplate.models.gguf_tokenizer_reader import read_tokenizer
from halfplate.models.gguf_writer import write_gguf

WITH_GELU = ("gemma", "starcoder2", "phi2")  # which llama.cpp looks up in a table of half precision


def llama_logits(path: Path) -> np.ndarray[Any, Any]:
    """Of llama.cpp, (tokens, vocabulary), with a cache in fp32 and attention in plain products."""
    llama = library()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False  # those for AMX stop the process on some virtual machines
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


def check_tokens(case: TokenizerCase, folder: Path) -> dict[str, Any]:
    """Texts whose tokens differ, and how many tokens there are.

    export: our file in llama.cpp against the tokenizer. import: our reading of the file, under each of the names, against
    llama.cpp; it says there what stands before a text only by its name.
    """
    tokenizer, path = case.build(), folder / "tokenizer.gguf"
    write(tokenizer, path, case.model_name)
    theirs = tokens(path, case.texts)
    row: dict[str, Any] = {
        "case": case.name,
        "digest": tokenizer_digest(path),
        "ids": theirs,
        "import": 0,
        "unknown": [],
    }
    row["export"] = differing(tokenizer, case, theirs)
    row["import"] += differing(read_tokenizer(path, path.name), case, theirs)
    for name in case.names:
        write(tokenizer, path, case.model_name, pre=name)
        try:
            theirs = tokens(path, case.texts)
        except RuntimeError:
            row["unknown"].append(name)
            continue
        row["import"] += differing(read_tokenizer(path, path.name), case, theirs)
    return row


def differing(tokenizer: Any, case: TokenizerCase, theirs: list[list[int]]) -> int:
    """Texts of which the tokenizer makes other tokens."""
    return sum(ours != ids for ours, ids in zip(tokenizer(case.texts)["input_ids"], theirs, strict=True))


def logits_table(rows: list[dict[str, Any]]) -> str:
    ways = [f"{way}_{kind}" for kind in ("f32", "f16") for way in ("import", "export")]
    return table(
        ["case", "model of transformers", "import", "export", "import, F16", "export, F16"],
        [[row["case"], row["model"], *(f"{row[way]:.1e}" for way in ways)] for row in rows],
    )


def tokens_table(rows: list[dict[str, Any]]) -> str:
    names = {case.name: case.names for case in TOKENIZERS}
    return table(
        ["tokenizer", "names read", "not in this llama.cpp", "texts", "tokens", "import differs", "export differs"],
        [
            [
                *(row["case"], ", ".join(names[row["case"]]), ", ".join(row["unknown"]) or "-", str(len(row["ids"]))),
                *(str(sum(map(len, row["ids"]))), str(row["import"]), str(row["export"])),
            ]
            for row in rows
        ],
    )


def report(families: list[dict[str, Any]], tokenizers: list[dict[str, Any]]) -> str:
    """The section of RESULTS.md."""
    plain = [row for row in families if not row["case"].startswith(WITH_GELU)]
    worst = [max(max(row["import_f32"], row["export_f32"]) for row in some) for some in (plain, families)]
    architectures = len({family.architecture for family in FAMILIES})
    differ = sum(row["import"] + row["export"] for row in tokenizers)
    return (
        f"`python tests/stress/gguf_check.py` · {version()} · {machine()}\n\n"
        f"{architectures} architectures in {len(families)} cases; worst difference of logits in F32 {worst[0]:.1e}, {worst[1]:.1e} with GELU. "
        f"{len(tokenizers)} kinds of tokenizers; texts with other tokens: {differ}.\n\n"
        f"{logits_table(families)}\n\n{tokens_table(tokenizers)}"
    )


def kept_logits(row: dict[str, Any]) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in one] for one in row["logits"]]


def stored(rows: list[dict[str, Any]], key: str, value: Callable[[dict[str, Any]], Any], path: Path) -> None:
    """A JSON file with a line for each case."""
    lines = {row["case"]: {"digest": row["digest"], key: value(row)} for row in rows}
    path.write_text(json.dumps(lines, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="print cases whose name contains this, and write nothing")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="write what llama.cpp said into this folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose section is replaced")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        families = [check(case, Path(folder)) for case in CASES if args.only in case.name]
        tokenizers = [check_tokens(case, Path(folder)) for case in TOKENIZERS if args.only in case.name]
    if args.only:
        print(f"{logits_table(families)}\n\n{tokens_table(tokenizers)}")
        return
    if args.store:
        stored(families, "logits", kept_logits, args.store / "gguf_logits.json")
        stored(tokenizers, "tokens", lambda row: kept_tokens(row["ids"]), args.store / "gguf_tokens.json")
    write_section("gguf", report(families, tokenizers), args.results)


if __name__ == "__main__":
    main()
