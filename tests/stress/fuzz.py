"""Mutations of valid files against every reader of a stranger's file: checkpoint, recipe, GGUF, text, config.json.

    python tests/stress/fuzz.py --inputs 100000 --configs 2000 --seed 0

Each input is a valid file with a few bytes, numbers or lines changed. A reader may take it or refuse it with a HalfplateError; anything
else is a crash, whose input is kept under --keep. The address space is bounded, so that an allocation by a hostile number fails.
Texts (`fuzz_texts.py`) are read twice, at once and in small blocks, and must come out alike. Configurations (`fuzz_configs.py`) are those of many architectures, and are planned; there, inputs that take longer than a minute and
libraries that print a traceback count as crashes, too.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fuzz_texts
from common import write_section
from fuzz_configs import ARCHITECTURES, fuzz_configs

from halfplate.checkpoint.read import inspect_checkpoint
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.models import gguf
from halfplate.models.sources import open_source, skeleton
from halfplate.models.weight_files import find_weight_files
from halfplate.recipe import Recipe

ROOM = 6 * 2**30  # bytes of address space beyond what the process has when fuzzing begins
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**64 - 1)
WORDS = (
    b"null",
    b"-1",
    b"1e999",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"NaN",
    b"[[[[",
    b"&a",
    b"*a",
    b"!!python/object:os.system",
    b"\xff",
    b"9" * 99,
)
KINDS = (0, 1, 2, 3, 4, 5)  # a bit, a number of 8 or 4 bytes, a word, bytes left out or doubled
TEXT_KINDS = (0, 3, 3, 3, 4, 5)  # numbers are no text
SHARES = {"recipe": 0.2, "checkpoint": 0.2, "gguf": 0.3, "text": 0.3}
CONFIG = "config"
CONFIGURED = 3  # of so many GGUF files with a sound header one is read whole


def mutated(
    content: bytes, chance: random.Random, focus: int, words: tuple[bytes, ...] = WORDS, kinds: tuple[int, ...] = KINDS
) -> bytes:
    """A few changes, most of them in the first `focus` bytes, where headers lie."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        place = chance.randrange(max(1, min(len(data), focus if chance.random() < 0.9 else len(data))))
        kind = chance.choice(kinds)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place : place + 8] = struct.pack("<Q", chance.choice(NUMBERS))
        elif kind == 2:
            data[place : place + 4] = struct.pack("<I", chance.choice(NUMBERS) % 2**32)
        elif kind == 3:
            word = chance.choice(words)
            data[place : place + chance.choice((0, len(word)))] = word
        elif kind == 4:
            del data[place : place + chance.choice((1, 2, 8, 64))]
        else:
            data[place:place] = data[place : place + chance.choice((1, 8, 64))]
    return bytes(data)


def write_models(folder: Path) -> tuple[Path, Path, Path]:
    """A dense folder, its checkpoint and a GGUF file, as small as they come."""
    import gguf as writing
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    dense, out, file = folder / "dense", folder / "out", folder / "tiny.gguf"
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).save_pretrained(dense)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(32)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1").save_pretrained(dense)
    compress(str(dense), out, Recipe(method="magnitude"))
    for idle in ("report.html", "log.jsonl"):
        (out / idle).unlink(missing_ok=True)
    writer = writing.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{index}" for index in range(32)])
    writer.add_token_types([1] * 32)
    outer = {"token_embd": (32, 16), "output": (32, 16), "output_norm": (16,)}
    block = {f"attn_{name}": (16, 16) for name in ("q", "k", "v", "output")} | {"attn_norm": (16,), "ffn_norm": (16,)}
    block |= {"ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
    for name, shape in (outer | {f"blk.0.{name}": shape for name, shape in block.items()}).items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense, out, file


def targets(folder: Path) -> dict[str, tuple[list[Path], Callable[[Path], object]]]:
    """Files to mutate and the reading to try, given the one that was, by reader."""
    dense, out, model = write_models(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "version: 1\nmethod: armor\nmethod_options:\n  iterations: 20\n  objective: gram\nblock_size: 16\nsamples: 64\nseq_len: 512\n"
        "cross_damping: 1e-1\ntoken_limit: none\nexclude:\n  - '*.k_proj'\n  - \"*.0.*\"\nchoose: [block_size, core_dtype]\nbudget: 0.5\nmax_kl: 1.0\n"
    )

    def read_checkpoint(_: Path) -> object:
        find_weight_files("dense", dense)
        return inspect_checkpoint(out, verify=True)

    sound = 0

    def read_gguf(_: Path) -> None:
        nonlocal sound
        gguf.read_header(model, "tiny.gguf")
        sound += 1
        if sound % CONFIGURED == 0:
            source = open_source(str(model))
            for _ in gguf.read_tensors(model, "tiny.gguf", skeleton(source)):
                pass

    files = [out / name for name in ("config.json", "halfplate.json", "model.safetensors")] + [
        dense / "model.safetensors"
    ]
    return {
        "recipe": ([recipe], lambda _: Recipe.from_yaml(recipe)),
        "checkpoint": (files, read_checkpoint),
        "gguf": ([model], read_gguf),
        "text": (fuzz_texts.write_texts(folder), fuzz_texts.text_reader()),
    }


def focus_of(path: Path, content: bytes) -> int:
    """Bytes in which most changes are worth while."""
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(content[:8], "little")
    return 4000 if path.suffix == ".gguf" else len(content)


def fuzz(
    name: str, paths: list[Path], read: Callable[[Path], object], inputs: int, chance: random.Random, keep: Path
) -> dict[str, int]:
    """How many inputs were taken, refused, and crashed the reader."""
    counts: Counter[str] = Counter(inputs=inputs)
    whole = {path: path.read_bytes() for path in paths}
    changes = (WORDS + fuzz_texts.WORDS, TEXT_KINDS) if name == "text" else (WORDS, KINDS)
    for number in range(inputs):
        path = chance.choice(paths)
        path.write_bytes(mutated(whole[path], chance, focus_of(path, whole[path]), *changes))
        try:
            read(path)
            counts["taken"] += 1
        except HalfplateError as refusal:
            counts["refused"] += 1
            counts["of several lines"] += "\n" in str(refusal)
        except Exception:
            counts["crashes"] += 1
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep / f"{name}-{number}-{path.name}")
            (keep / f"{name}-{number}.txt").write_text(traceback.format_exc())
        path.write_bytes(whole[path])
    return dict(counts)


def fuzz_reader(name: str, inputs: int, seed: int, keep: Path) -> tuple[dict[str, int], int]:
    """The counts of one reader, in a process of its own, and the bytes by which its peak memory grew."""
    torch.set_num_threads(1)
    # What divides by a stranger's number has not looked at it.
    warnings.simplefilter("error", RuntimeWarning)
    chance = random.Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory() as scratch:
        paths, read = ([], lambda _: None) if name == CONFIG else targets(Path(scratch))[name]
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + ROOM, pages + ROOM))
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if name == CONFIG:
            counts = dict(fuzz_configs(inputs, chance, Path(scratch), keep, tuple(ARCHITECTURES)))
            counts["crashes"] = sum(counts.get(kind, 0) for kind in ("crashes", "hangs", "tracebacks"))
        else:
            counts = fuzz(name, paths, read, inputs, chance, keep)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    seconds = round(time.monotonic() - start)
    print(json.dumps({"reader": name, **counts, "seconds": seconds, "peak_rss_growth": grown}), flush=True)
    return counts, grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--configs", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-crashes"), help="folder for inputs that crash a reader")
    parser.add_argument("--results", type=Path, help="file whose section on fuzzing is replaced, e.g. RESULTS.md")
    options = parser.parse_args()
    inputs = {name: round(options.inputs * share) for name, share in SHARES.items()} | {CONFIG: options.configs}
    inputs = {name: count for name, count in inputs.items() if count}
    with ProcessPoolExecutor(len(inputs), get_context("spawn")) as pool:
        jobs = {
            name: pool.submit(fuzz_reader, name, count, options.seed, options.keep.resolve())
            for name, count in inputs.items()
        }
        rows = [(name, *job.result()) for name, job in jobs.items()]
    table = [
        "| reader | inputs | accepted | refused in one line | crashes | peak memory above the start |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, counts, grown in rows:
        one_line = counts.get("refused", 0) - counts.get("of several lines", 0)
        table.append(
            f"| {name} | {counts['inputs']:,} | {counts.get('taken', 0):,} | {one_line:,} | {counts.get('crashes', 0)} | {grown / 1e6:.0f} MB |"
        )
    print("\n".join(table))
    if options.results:
        write_section("fuzz", "\n".join(table), options.results)


if __name__ == "__main__":
    main()
