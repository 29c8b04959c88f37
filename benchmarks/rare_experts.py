"""Rarely routed experts: solved by ARMOR like all others, or left to a method without data.

    python benchmarks/rare_experts.py [--steps 300]    about two minutes on one core; writes its section of RESULTS.md with --write

A small mixture (Qwen3-MoE, 16 experts, 2 of them active) learns the stories of tests/trained/train.py. It is compressed with ARMOR to 2:4 and to
unpruned int4. In a second model, the experts that get fewer tokens than half an even share are those of `magnitude` (2:4) or `rtn` (int4).
Both are compared with the original on other stories.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, machine, table, write_section

import halfplate
from halfplate.compression.compress import compress
from halfplate.evaluation.perplexity import compare
from halfplate.models.experts import experts_of, linear_experts
from halfplate.recipe import Recipe

sys.path.insert(0, str(ROOT / "tests" / "trained"))
import train as stories

LENGTH, BATCH, RATE = stories.LENGTH, 16, 3e-3
SAMPLES, JUDGED = 32, 64  # sequences to calibrate on, and to compare on
EXPERTS, ACTIVE, LAYERS = 16, 2, 3
# By the name of the row: the recipe of ARMOR, and the method without data for the same format.
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "2:4": ({"pattern": "2:4", "core_dtype": "bf16", "block_size": 8}, "magnitude"),
    "int4": ({"pattern": "dense", "core_dtype": "int4", "group_size": 32, "block_size": 8}, "rtn"),
}


def trained(tokenizer: Any, steps: int) -> Any:
    """The mixture after `steps` steps, in fp32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        experts_implementation="eager",
    )
    model: Any = Qwen3MoeForCausalLM(config)
    ids = torch.tensor(tokenizer(stories.text(stories.TRAIN, 12_000), add_special_tokens=False)["input_ids"])
    stories.learn(model, ids, steps, BATCH, RATE)
    return model.eval()


def compressed(folder: Path, name: str, text: Path, **fields: Any) -> tuple[Any, dict[str, int]]:
    """The checkpoint as a model of plain weights, whose experts are linears, and the tokens of each expert."""
    recipe = Recipe(samples=SAMPLES, seq_len=LENGTH, threads=1, **fields)
    compress(str(folder / "model"), folder / name, recipe, calibration=str(text), benchmark=False, overwrite=True)
    record = json.loads((folder / name / "halfplate.json").read_text())["matrices"]
    tokens = {
        place.rpartition(".")[0]: entry.get("tokens", 0) for place, entry in record.items() if ".experts." in place
    }
    return linear_experts(halfplate.load(folder / name, kernels=False).dequantize()), tokens


def with_others(model: Any, other: Any, experts: list[str]) -> Any:
    """`model` with the weights that `other` has in some experts, in place."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(name.startswith(f"{expert}.") for expert in experts):
                parameter.copy_(theirs[name])
    return model


@torch.no_grad()
def kl(model: Any, original: Any, ids: torch.Tensor) -> float:
    """KL(original ‖ model), mean nats per token."""
    logits, expected = (one(ids).logits[:, :-1].flatten(0, 1) for one in (model, original))
    return compare(logits, expected, ids[:, 1:].flatten())["kl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, rows = time.process_time(), []
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        text.write_text(stories.text(stories.CALIBRATE, 400))
        tokenizer = stories.make_tokenizer()
        original = trained(tokenizer, options.steps)
        original.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        judged = tokenizer(stories.text(stories.JUDGE, 800), add_special_tokens=False)["input_ids"]
        ids = torch.tensor(judged[: JUDGED * LENGTH]).view(JUDGED, LENGTH)
        for name, (fields, without_data) in FORMATS.items():
            own = {key: value for key, value in fields.items() if key != "block_size"}
            plain, _ = compressed(folder, f"{name} plain", text, method=without_data, **own)
            gated, _ = compressed(folder, f"{name} gated", text, method="armor", expert_tokens="gated", **fields)
            solved, tokens = compressed(folder, name, text, method="armor", **fields)
            even = SAMPLES * LENGTH * ACTIVE / EXPERTS
            rare = [expert for expert, count in tokens.items() if count < even / 2]
            assert len(tokens) == EXPERTS * LAYERS
            assert experts_of(solved)
            figures = [kl(one, original, ids) for one in (plain, gated, solved)]
            figures.append(kl(with_others(solved, plain, rare), original, ids))
            rows.append([name, *(f"{figure:.3g}" for figure in (*figures[2:], *figures[:2])), f"{len(rare)} of {len(tokens)}"])  # fmt: skip
            print(rows[-1], flush=True)
    head = [
        "format",
        "ARMOR on all experts",
        "rare ones without data",
        "all without data",
        "ARMOR, gated tokens",
        "rare experts",
    ]
    told = f"`python benchmarks/rare_experts.py --steps {options.steps}` · {machine()}; {time.process_time() - begin:.0f} s of CPU. KL to the original, nats per token."
    result = f"{told}\n\n{table(head, rows)}"
    if options.write:
        write_section("rare_experts", result)
    else:
        print(result)


if __name__ == "__main__":
    main()
