"""Trains the small model of this folder: python tests/trained/train.py OUT (three minutes on two cores).

It is a Llama of 170,000 parameters that tells stories of a grammar: who has how many things, who gives some to whom, what is left.
The tests measure on it that compression keeps what was learned, with no model of anybody else.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

PEOPLE = {"Tom": "He", "Mia": "She", "Ben": "He", "Lily": "She", "Max": "He", "Anna": "She", "Sam": "He", "Zoe": "She"}
THINGS = ("apple", "ball", "book", "shell", "stone", "kite", "coin", "leaf")
PLURALS = {"leaf": "leaves"}
COLOURS = ("red", "blue", "green", "small", "old", "shiny")
PLACES = ("in the park", "at the beach", "in the kitchen", "near the river", "under the big tree", "at school")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEELINGS = ("happy", "proud", "tired", "kind")
STEPS, BATCH, LENGTH, LEARNING_RATE = 1200, 16, 128, 4e-3
TRAIN, CALIBRATE, JUDGE = 0, 1, 2  # seeds of texts; no two share a story by more than chance


def amount(count: int, thing: str) -> str:
    return f"{NUMBERS[count]} {thing if count == 1 else PLURALS.get(thing, thing + 's')}"


def story(draw: random.Random) -> str:
    """Five or six sentences, whose numbers, names, places and pronouns agree."""
    giver, taker = draw.sample(list(PEOPLE), 2)
    thing, colour, place = draw.choice(THINGS), draw.choice(COLOURS), draw.choice(PLACES)
    count = draw.randint(2, 9)
    given = draw.randint(1, count)
    left = count - given
    lines = [
        f"{giver} was {place} and had {amount(count, f'{colour} {thing}' if thing not in PLURALS else thing)}.",
        f"{taker} came and asked for {amount(given, thing)}.",
        f"{giver} said yes and gave {taker} {amount(given, thing)}.",
        f"Now {giver} had {amount(left, thing)} and {taker} had {amount(given, thing)}.",
        f"{PEOPLE[taker]} said thank you, and {giver} was {draw.choice(FEELINGS)}.",
    ]
    if draw.random() < 0.5:
        lines.append(f"Then they went home from {place.split(' ', 1)[1]}.")
    return " ".join(lines)


def text(seed: int, stories: int) -> str:
    """Stories of a seed, a line each."""
    draw = random.Random(seed)
    return "\n".join(story(draw) for _ in range(stories)) + "\n"


def next_token_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the tokens after the first of each sequence, int64 (sequences, tokens)."""
    return functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def learn(
    model: Any,
    ids: torch.Tensor,
    steps: int,
    batch: int,
    rate: float,
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor] = next_token_loss,
) -> None:
    """Train `model` in place on windows of LENGTH tokens of `ids`, int64 (tokens,), which are drawn by torch's generator.

    batch: windows a step. rate: the largest learning rate. loss_of: the loss of the model on windows (batch, LENGTH + 1).
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH - 1, (batch,))
        loss = loss_of(model, torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def train(out: Path) -> None:
    """Train the tokenizer and the model and write both, the model in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    ids = torch.tensor(tokenizer(text(TRAIN, 12_000), add_special_tokens=False)["input_ids"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    learn(model, ids, STEPS, BATCH, LEARNING_RATE)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_tokenizer() -> Any:
    """A tokenizer of 384 tokens that has learned on the stories."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(TRAIN, 2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
