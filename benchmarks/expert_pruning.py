"""Measure pruning of experts on a small mixture that this script trains: KL and bytes, in one table.

    python benchmarks/expert_pruning.py -o FOLDER        about fifteen minutes on one core, most of them training

The mixture has the shape of a Qwen3-MoE and 1.8 million parameters, nine tenths of them in 4 × 16 experts, of which each token goes to 4. It
learns stories, articles and solutions of small sums (TinyStories, WikiText-2, GSM8K) with the tokenizer of stories260K. FOLDER keeps the
model and one line of JSON for each finished row, so a second call continues. benchmarks/common.py says where the data are looked for.
"""

import argparse
import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common import DATA, ROOT, SHARED, machine, table, write_section
from torch.nn import functional
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import halfplate

sys.path.insert(0, str(ROOT / "tests" / "trained"))
import train as stories

STEPS, BATCH, LEARNING_RATE = 1200, 12, 3e-3
SAMPLES, WINDOWS, SEQ_LEN, PARAGRAPH = 64, 64, 128, 800
HEADER = ["experts", "weights", "MB", "KL", "top-1", "perplexity"]
# By the name of a row: the transform and the share of the parameters that stay, and the recipe of what follows.
PRUNED = {
    f"{name}, {experts}": ((name, experts), None)
    for experts in (12, 8, 6)
    for name in ("expert-merge", "expert-frequency", "stun", "reap")
}
SPARSE = {"all 16, 3:8": (None, "3:8")}
SPARSE |= {f"{name}, 11, then 4:8": ((name, 11), "4:8") for name in ("stun", "reap")}
SPARSE |= {"all 16, 2:8": (None, "2:8")}
SPARSE |= {
    f"{name}, {experts}, then {pattern}": ((name, experts), pattern)
    for experts, pattern in ((10, "3:8"), (7, "4:8"))
    for name in ("stun", "reap")
}


def prepare(folder: Path) -> None:
    """Write the texts and the trained model, unless they are there."""
    stories = [json.loads(line)["text"] for line in _lines("tinystories/train_sample.jsonl.gz")]
    articles = "\n".join(_lines("wikitext2/train_1MB.txt.gz"))
    sums = map(json.loads, _lines("gsm8k/train.jsonl.gz"))
    documents = [
        *stories,
        *(articles[start : start + PARAGRAPH] for start in range(0, len(articles), PARAGRAPH)),
        *(f"{one['question']}\n{one['answer']}" for one in sums),
    ]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    parts = {"judge": order[:300], "calibrate": order[300:600], "train": order[600:]}
    for name, chosen in parts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(documents[number] for number in chosen))
    if not (folder / "model" / "config.json").is_file():
        train(folder)


def _lines(file: str) -> list[str]:
    with gzip.open(DATA / file, "rt") as text:
        return text.read().strip("\n").split("\n")  # not at the line breaks of Unicode


def train(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    ids = torch.tensor(tokenizer((folder / "train.txt").read_text(), add_special_tokens=False)["input_ids"])
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        router_aux_loss_coef=0.003,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(ids):,} tokens", flush=True)

    def balanced_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        found = model(batch[:, :-1], output_router_logits=True)
        loss = functional.cross_entropy(found.logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss + config.router_aux_loss_coef * found.aux_loss

    stories.learn(model, ids, STEPS, BATCH, LEARNING_RATE, balanced_loss)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def measured(folder: Path, name: str, pruning: tuple[str, int] | None, pattern: str | None) -> dict[str, Any]:
    """One row: prune, compress, evaluate, remove."""
    model, text = (
        folder / "model",
        {"calibration": str(folder / "calibrate.txt"), "samples": SAMPLES, "seq_len": SEQ_LEN},
    )
    pruned, out = folder / "pruned", folder / "out"
    options: dict[str, Any] = text | {"threads": 1, "overwrite": True, "check": False}
    result = model
    if pruning is not None:
        made = halfplate.prune(model, pruned, share(folder, pruning[1]), transforms=[pruning[0]], **options)
        assert f"{pruning[1]} of 16 experts" in made["pruned"]["told"], made["pruned"]["told"]
        result = pruned
    if pattern is not None:
        halfplate.compress(result, out, method="wanda", pattern=pattern, benchmark=False, **options)
        result = out
    judge = str(folder / "judge.txt")
    scores = halfplate.evaluate(result, against=model, text=judge, windows=WINDOWS, seq_len=SEQ_LEN)
    nbytes = sum(path.stat().st_size for path in result.glob("*.safetensors"))
    for made_folder in (pruned, out):
        shutil.rmtree(made_folder, ignore_errors=True)
    return {
        "name": name,
        "nbytes": nbytes,
        **{key: scores[key] for key in ("kl", "top1_agreement", "perplexity", "dense_perplexity")},
    }


def share(folder: Path, experts: int) -> float:
    """The share of the parameters with which so many of 16 experts stay."""
    config = Qwen3MoeConfig.from_pretrained(folder / "model")
    sizes = []
    for count in (16, experts):
        config.num_experts = count
        with torch.device("meta"):
            sizes.append(Qwen3MoeForCausalLM(config).num_parameters())
    return sizes[1] / sizes[0] + 1e-6


def rendered(rows: list[dict[str, Any]], order: dict[str, Any]) -> str:
    by_name = {row["name"]: row for row in rows}
    lines = [
        [
            *_parts(name),
            f"{row['nbytes'] / 1e6:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['perplexity']:.2f}",
        ]
        for name in order
        if (row := by_name.get(name)) is not None
    ]
    return f"{machine()}. Perplexity of the original: {rows[0]['dense_perplexity']:.2f}.\n\n{table(HEADER, lines)}"


def _parts(name: str) -> tuple[str, str]:
    experts, _, weights = (
        name.partition(", then ") if "then" in name else name.rpartition(", ") if ":" in name else (name, "", "bf16")
    )
    return experts, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prepare(folder)
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {row["name"] for row in rows}
    for name, (pruning, pattern) in (PRUNED | SPARSE).items():
        if name not in done:
            rows.append(measured(folder, name, pruning, pattern))
            print(rows[-1], flush=True)
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
    write_section("experts-pruned", rendered(rows, PRUNED))
    write_section("experts-sparse", rendered(rows, SPARSE))


if __name__ == "__main__":
    main()
