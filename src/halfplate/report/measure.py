"""Measurements against the original model: quality, speed, and sample answers of both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfplate.calibration.documents import Text
from halfplate.calibration.held_out import held_out_tokens
from halfplate.calibration.vocabulary import check_tokens
from halfplate.checkpoint.loading import calibration_seed
from halfplate.checkpoint.read import load, load_tokenizer
from halfplate.errors import HalfplateError
from halfplate.evaluation.bench import bench
from halfplate.evaluation.perplexity import evaluate, token_windows
from halfplate.models.context import positions
from halfplate.models.sources import load_dense
from halfplate.report.settings import Measuring
from halfplate.runtime.sampling import native_sampling
from halfplate.telemetry.progress import Report


def measure(folder: Path, settings: Measuring, report: Report) -> dict[str, Any]:
    """The `measures` line of the log; raises HalfplateError if the original model does not match the checkpoint."""
    measures: dict[str, Any] = {"event": "measures", "against": settings.against}
    report("reading", 0, 1)
    dense = load_dense(settings.against)
    compressed = load(folder, activations="float")  # the same figures on every machine
    tokenizer = load_tokenizer(folder)
    if dense.model.config.get_text_config().vocab_size != compressed.config.get_text_config().vocab_size:
        raise HalfplateError(
            f"against={settings.against!r} does not have the same vocabulary as {str(folder)!r}; give the original model that it was compressed from"
        )
    report("reading", 1, 1)
    limit = positions(dense.model) or settings.seq_len
    seq_len = min(settings.seq_len, limit)
    source: dict[str, Any]
    if settings.text is None:
        seed = calibration_seed(str(folder))
        held_out = held_out_tokens(
            dense.model, dense.tokenizer, seed, settings.windows, seq_len, report, native_sampling
        )
        windows, source = held_out.ids, {"protocol": held_out.protocol()}
    else:
        text = Text(settings.text, "text")
        windows = token_windows(tokenizer, text, seq_len, settings.windows)
        check_tokens(windows, dense.model, f"text={settings.text!r}", tokenizer)
        source = {"text": Path(settings.text).name} | text.facts()
    measures["quality"] = source | evaluate(
        compressed, windows, dense.model, lambda done, total: report("evaluating", done, total)
    )
    measures["answers"] = [
        {"prompt": prompt}
        | {
            name: _answer(model, tokenizer, prompt, min(settings.new_tokens, limit // 2))
            for name, model in (("dense", dense.model), ("compressed", compressed))
        }
        for prompt in settings.prompts
    ]
    del dense, compressed
    length = min(settings.bench_prompt, limit // 2)
    measures["speed"] = bench(
        str(folder),
        settings.against,
        prompt=length,
        new_tokens=min(settings.new_tokens, limit - length),
        rounds=settings.rounds,
        progress=report,
    )
    return measures


def _answer(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The greedy continuation of `prompt` by `model`, in the chat template if the tokenizer has one."""
    import torch

    from halfplate.runtime import greedy
    from halfplate.runtime.limits import check_generation

    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    limit = positions(model)
    if not ids or (limit is not None and len(ids) + new_tokens > limit):
        raise HalfplateError(
            f"prompt={prompt[:60]!r} has {len(ids)} tokens, expected 1 to {(limit or 0) - new_tokens} for this model; give another prompt"
        )
    check_tokens(ids, model, f"prompt={prompt[:60]!r}", tokenizer)
    check_generation(model.config, len(ids), new_tokens, "new_tokens")
    ends = model.generation_config.eos_token_id
    stop = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    tokens = greedy(model, torch.tensor([ids], dtype=torch.int64, device="cpu"), new_tokens, stop)
    said: str = tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
    return said
