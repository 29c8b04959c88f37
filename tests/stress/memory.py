"""Resident memory of `halfplate compress` on models of random weights that are larger than what it may hold.

    python tests/stress/memory.py                  # 3B parameters in bf16, then growth with depth; twenty minutes on two quiet cores
    python tests/stress/memory.py --size growth    # growth with depth alone

A Llama of 68 blocks (hidden 2048, ffn 5632) is written block by block and compressed by ARMOR from a text file, few tokens and two iterations; every
17th block is solved, all are read, run and written. Another process reads the memory of that one ten times a second. The bound is that
of docs/memory.md. Models and results take 16 GB in --folder (by default a temporary one).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESULTS, ROOT, machine, table, write_section

from halfplate.storage.tensor_file import TensorFileWriter

SAMPLES, SEQ_LEN, ITERATIONS = 16, 64, 2
INTERVAL = 0.1  # seconds between two readings
DEPTHS = (6, 12, 24)
PAGE = ROOT / "docs" / "memory.md"
PICTURE = ROOT / "docs" / "pictures" / "memory.svg"


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights. solved: of so many blocks one is compressed, the others pass as they are."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int
    solved: int = 1


SHAPES = {
    "3b": Shape(2048, 5632, 32, 4, 68, 32000, solved=17),
    "growth": Shape(768, 2048, 12, 4, 24, 8192),
    "tiny": Shape(64, 96, 4, 2, 6, 320, solved=2),
}


def write_model(folder: Path, shape: Shape) -> int:
    """A model folder in bf16, one file a block, and its parameters; alike matrices hold the same numbers, which are quick to make."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    write_tokenizer(folder, shape.vocabulary)
    random = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], Tensor] = {}
    weight_map, parameters = {}, 0
    for file, shapes in tensors_of(shape):
        with TensorFileWriter(folder / file, {name: (torch.bfloat16, size) for name, size in shapes.items()}) as writer:
            for name, size in shapes.items():
                if size not in made:
                    plain = torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=random)
                    made[size] = plain.bfloat16()
                writer.write(name, made[size])
                weight_map[name], parameters = file, parameters + math.prod(size)
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def tensors_of(shape: Shape) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """The files of the model, and the tensors of each by name with their shapes."""
    hidden, ffn, keys = shape.hidden, shape.ffn, shape.hidden // shape.heads * shape.kv_heads
    outer = {"model.embed_tokens.weight": (shape.vocabulary, hidden), "lm_head.weight": (shape.vocabulary, hidden)}
    yield "model-outer.safetensors", {**outer, "model.norm.weight": (hidden,)}
    inside: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for block in range(shape.blocks):
        yield (
            f"model-{block:03d}.safetensors",
            {f"model.layers.{block}.{name}.weight": size for name, size in inside.items()},
        )


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One token a word `w17`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(folder)


@dataclass(frozen=True)
class Watched:
    """A compression seen from outside. curve: seconds and resident bytes. bound, estimate: what the plan said."""

    shape: Shape
    parameters: int
    curve: list[tuple[float, int]]
    bound: int
    estimate: int
    seconds: float

    @property
    def peak(self) -> int:
        return max(resident for _, resident in self.curve)


def watch(shape: Shape, folder: Path) -> Watched:
    """Write the model, compress it, and remove both."""
    model, text, out = folder / "model", folder / "text.txt", folder / "out"
    model.mkdir()
    parameters = write_model(model, shape)
    words = torch.randint(3, shape.vocabulary, (4 * SAMPLES * SEQ_LEN,), generator=torch.Generator().manual_seed(1))
    text.write_text(" ".join(f"w{word}" for word in words.tolist()))
    options = ["--calibration", str(text), "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    options += ["--iterations", str(ITERATIONS), "--no-benchmark"]
    for block in range(0, shape.blocks, shape.solved):
        options += ["--include", f"model.layers.{block}.*"]
    halfplate = [sys.executable, "-m", "halfplate"]
    planned = subprocess.run(
        [*halfplate, "plan", model, *options, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    plan = json.loads(planned.stdout)
    start, curve = time.monotonic(), list[tuple[float, int]]()
    with subprocess.Popen([*halfplate, "compress", model, "-o", out, *options], stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            curve.append((time.monotonic() - start, resident(run.pid)))
            time.sleep(INTERVAL)
    if run.returncode:
        raise SystemExit(f"compress ended with status {run.returncode}")
    # What is reached between two readings the kernel knows.
    curve.append((time.monotonic() - start, peak_told(out / "log.jsonl")))
    for place in (model, out):
        shutil.rmtree(place)
    return Watched(
        shape,
        parameters,
        curve,
        plan["memory_bound_bytes"],
        plan["peak_memory_bytes_estimate"],
        time.monotonic() - start,
    )


def resident(process: int) -> int:
    """Bytes of the process in memory, 0 where it has gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def peak_told(log: Path) -> int:
    """The largest resident size that the kernel had counted when the run ended."""
    return max(json.loads(line)["peak_rss_bytes"] or 0 for line in log.read_text().splitlines())


def draw(found: Watched, path: Path) -> None:
    """Resident memory over time, under the bound and beside the model's own size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": "halfplate", "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(10, 4.5), facecolor="white")
        axes.plot(
            [at / 60 for at, _ in found.curve[:-1]],
            [held / 1e9 for _, held in found.curve[:-1]],
            color="#1f6fb4",
            lw=1.2,
        )
        lines = [
            (found.bound, "bound: 2 layers in fp32 + embeddings + Gram matrices of one layer + 1.5 GB", "#d1342f"),
            (2 * found.parameters, f"the model of {found.parameters / 1e9:.2f}B parameters in bf16", "#6b6b6b"),
        ]
        for held, text, colour in lines:
            axes.axhline(held / 1e9, color=colour, lw=1, ls="--")
            axes.annotate(text, (0, held / 1e9), (4, 4), textcoords="offset points", color=colour, fontsize=9)
        axes.set_ylim(0, 1.15 * max(held for held, _, _ in lines) / 1e9)
        axes.set_xlim(left=0)
        axes.set_xlabel("minutes")
        axes.set_ylabel("resident memory, GB")
        axes.grid(True, color="#dddddd", lw=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


def peak_table(found: Sequence[Watched]) -> str:
    """One row a model."""
    rows = [
        [
            f"{one.shape.hidden} / {one.shape.ffn}",
            str(one.shape.blocks),
            f"{one.parameters / 1e6:,.0f}",
            *(
                f"{nbytes / 1e9:.3f}"
                for nbytes in (2 * one.parameters, 4 * one.parameters, one.peak, one.bound, one.estimate)
            ),
            f"{one.peak / found[0].peak:.3f}",
        ]
        for one in found
    ]
    header = [
        "hidden / ffn",
        "layers",
        "parameters, M",
        "in bf16, GB",
        "in fp32, GB",
        "peak, GB",
        "bound, GB",
        "estimate of the plan, GB",
    ]
    return table([*header, "peak, relative to the first row"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["3b", "growth"])
    parser.add_argument(
        "--depths", type=int, nargs="+", default=list(DEPTHS), help="blocks of the models of --size growth"
    )
    parser.add_argument("--folder", type=Path, help="where models and results are written")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file whose sections are replaced")
    options = parser.parse_args()
    too_much = []
    for size in options.size:
        found = []
        for depth in options.depths if size == "growth" else [SHAPES[size].blocks]:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                found.append(watch(replace(SHAPES[size], blocks=depth), Path(folder)))
            print(f"{size}, {depth} blocks: {found[-1].peak / 1e9:.3f} GB in {found[-1].seconds:.0f} s", flush=True)
        too_much += [f"{size}: {one.peak} over {one.bound}" for one in found if one.peak > one.bound]
        if size != "growth":
            draw(found[0], options.picture)
        if size == "3b":
            write_section(
                "memory_curve", f"![Resident memory over time]({options.picture.relative_to(PAGE.parent)})", PAGE
            )
        command = f"`python tests/stress/memory.py --size {size}`"
        write_section(f"memory_{size}", f"{command} · {machine()}\n\n{peak_table(found)}", options.results)
    if too_much:
        raise SystemExit(f"above the bound: {', '.join(too_much)}")


if __name__ == "__main__":
    main()
