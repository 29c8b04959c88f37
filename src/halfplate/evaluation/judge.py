"""Evaluating any model: reading it and its texts, measuring, and combining the measurements."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from halfplate.arguments import path_text
from halfplate.calibration.documents import Text, split_fields
from halfplate.calibration.held_out import held_out_tokens
from halfplate.calibration.text import check_seq_len, check_tokens_fit
from halfplate.calibration.vocabulary import check_tokens
from halfplate.checkpoint.loading import calibration_seed, load_any
from halfplate.defaults import plain_defaults
from halfplate.errors import HalfplateError
from halfplate.evaluation import perplexity
from halfplate.evaluation.perplexity import check_logits_fit, token_windows
from halfplate.kernels.linear import taken_activations
from halfplate.limits import use_threads
from halfplate.models.context import positions
from halfplate.models.sources import is_compressed
from halfplate.runtime.sampling import native_sampling
from halfplate.telemetry.progress import Report, silent

SEQ_LEN = 1024
SELF_SEQ_LEN = 256
SELF_WINDOWS = 16
TEXT_SUFFIXES = (".gz", ".txt", ".jsonl", ".json")
MEANS = ("kl", "top1_agreement")


@plain_defaults()
def evaluate(
    model: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    tasks: str | Sequence[str] | None = None,
    against: str | Path | None = None,
    seq_len: int | None = None,
    windows: int | None = None,
    tasks_folder: str | None = None,
    limit: int | None = None,
    threads: int | None = None,
    activations: str = "auto",
    report: Report = silent,
    fit: int | str | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of `model`, KL and top-1 agreement with the original model `against`, and scores on lm-eval tasks.

    - model: a checkpoint, a folder, a Hub id or a `.gguf` file
    - text: sources to score (files, Hub data sets); None for held-out text that the original model generates. With `tasks`
      and no text, no text is scored
    - tasks, tasks_folder: names of lm-eval tasks, and a folder with more task definitions
    - seq_len: tokens per window, None for 1024, or 256 for generated text
    - windows: score only the first windows, None for all, or 16 of generated text
    - limit: score only the first rows of each task
    - activations, fit: as in `halfplate.load`

    Returns the object of `halfplate eval --json`: measurements over all texts, those of each text under `texts` if there are
    several, and those of each task under `tasks`. Raises HalfplateError on bad input.
    """
    model, against = path_text("model", model), None if against is None else path_text("against", against)
    texts = text if isinstance(text, list | tuple | None) else [text]
    sources = None if texts is None else [path_text("text", source) for source in texts]
    tasks = [tasks] if isinstance(tasks, str) else tasks
    sampler = against or model
    if sources is None and is_compressed(sampler) and not tasks:
        raise HalfplateError(
            f"text=None: {sampler!r} is compressed, and held-out text must come from an original model; give --text FILE or --against ORIGINAL"
        )
    if tasks is not None:
        from halfplate.evaluation.tasks import check_available

        check_available()
    use_threads(threads)
    documents = {name: Text(source, "text") for name, source in _names(sources or []).items()}
    if windows is not None:
        check_tokens_fit("windows", windows, seq_len or SELF_SEQ_LEN)

    report("reading", 0, 1)
    judged, tokenizer = load_any(model, activations=activations, fit=fit)
    dense, dense_tokenizer = load_any(against, activations="float") if against else (None, None)
    if dense is not None and dense.config.get_text_config().vocab_size != judged.config.get_text_config().vocab_size:
        raise HalfplateError(
            f"against={against!r} does not have the same vocabulary as {model!r}; give the original model that it was compressed from"
        )
    report("reading", 1, 1)
    scores = {} if tasks is None else {"tasks": _tasks(judged, tokenizer, tasks, tasks_folder, limit, report)}
    if scores and sources is None and against is None:
        return scores
    length = _seq_len(seq_len, judged, sampled=sources is None)
    taken = taken_activations(activations) if is_compressed(model) else "float"

    def scored(cut: torch.Tensor, what: str) -> dict[str, Any]:
        measures: dict[str, Any] = perplexity.evaluate(
            judged, cut, dense, lambda done, total: report(what, done, total)
        )
        return measures | {"activations": taken}

    if sources is None:
        held_out = held_out_tokens(
            dense or judged,
            dense_tokenizer or tokenizer,
            calibration_seed(model),
            windows or SELF_WINDOWS,
            length,
            report,
            native_sampling,
        )
        return scored(held_out.ids, "evaluating") | {"protocol": held_out.protocol()} | scores
    cuts = {name: token_windows(tokenizer, text, length, windows) for name, text in documents.items()}
    for name, cut in cuts.items():
        check_tokens(cut, judged, f"text={documents[name].source!r}", tokenizer)
    results = {name: scored(cut, f"evaluating {name}") | documents[name].facts() for name, cut in cuts.items()}
    if len(results) == 1:
        return next(iter(results.values())) | scores
    return _together(list(results.values())) | {"texts": results} | scores


def _tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], folder: str | None, limit: int | None, report: Report
) -> dict[str, Any]:
    from halfplate.evaluation.tasks import evaluate_tasks

    report("tasks", 0, 1)
    found = evaluate_tasks(model, tokenizer, list(tasks), folder, limit)
    report("tasks", 1, 1)
    return found


def _seq_len(seq_len: int | None, model: Any, sampled: bool) -> int:
    if seq_len is None:
        limit = positions(model) or SEQ_LEN
        return int(min(SELF_SEQ_LEN if sampled else SEQ_LEN, limit))
    check_seq_len(model, seq_len, least=2)
    check_logits_fit(model, seq_len)
    return seq_len


def _names(sources: Sequence[str]) -> dict[str, str]:
    """A short name for each text: its file name without suffixes, with its folder if that is not unique."""

    def short(source: str) -> str:
        name = Path(split_fields(source)[0]).name
        while (suffix := Path(name).suffix) in TEXT_SUFFIXES and suffix:
            name = name.removesuffix(suffix)
        return name

    stems = [short(source) for source in sources]
    named: dict[str, str] = {}
    for source, stem in zip(sources, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{Path(source).parent.name}/{stem}"
        named[source if name in named else name] = source
    return named


def _together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Measurements over several texts as if they were one: every scored token has the same weight."""
    tokens: list[int] = [result["tokens"] for result in results]

    def mean(values: list[float]) -> float:
        weighted = [value * count for value, count in zip(values, tokens, strict=True)]
        return math.fsum(weighted) / sum(tokens)

    first = results[0]
    whole: dict[str, Any] = {
        "tokens": sum(tokens),
        "windows": sum(r["windows"] for r in results),
        "seq_len": first["seq_len"],
    }
    for key in (key for key in ("perplexity", "dense_perplexity") if key in first):
        whole[key] = math.exp(mean([math.log(r[key]) for r in results]))
    return whole | {key: mean([r[key] for r in results]) for key in MEANS if key in first}
