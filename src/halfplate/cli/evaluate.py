"""Measure perplexity and, against a dense model, KL divergence and top-1 agreement."""

import argparse
import math
from pathlib import Path
from typing import Any

from halfplate.cli.parser import add_output_arguments, positive
from halfplate.errors import HalfplateError

SEQ_LEN = 1024
SELF_SEQ_LEN = 256
SELF_WINDOWS = 16
TEXT_SUFFIXES = (".gz", ".txt", ".jsonl")
MEANS = ("kl", "top1_agreement")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Halfplate checkpoint, a Hugging Face folder, a Hub id or a .gguf file"
    )
    text = "texts to score (.txt or .jsonl, also .gz; or a Hub data set); default: held-out text sampled from the dense model"
    parser.add_argument("--text", metavar="FILE", nargs="+", action="extend", help=text)
    parser.add_argument("--against", metavar="DENSE", help="the dense model to compare with")
    parser.add_argument(
        "--seq-len",
        type=positive,
        metavar="L",
        help=f"tokens of a window (default {SEQ_LEN}, {SELF_SEQ_LEN} for sampled text)",
    )
    parser.add_argument(
        "--windows",
        type=positive,
        metavar="N",
        help=f"only the first N windows (default all, {SELF_WINDOWS} of sampled text)",
    )
    parser.add_argument("--threads", type=positive, metavar="T", help="threads of torch")
    parser.add_argument(
        "--tasks", metavar="A,B", help="tasks of lm-eval to score on (needs halfplate[tasks]); alone, no text is scored"
    )
    parser.add_argument("--tasks-folder", metavar="DIR", help="folder with more task definitions of lm-eval")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each task")
    parser.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="int8 rounds activations for int8 and int4 cores (default float)",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.seq_len is not None and args.seq_len < 2:
        raise HalfplateError(f"--seq-len {args.seq_len} leaves no token to score; expected at least 2")
    import torch

    from halfplate.cli.console import print_json, progress, silence_libraries

    silence_libraries()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with progress(args) as report:
        result = measure(args, report)
    if args.json:
        print_json(result)
    else:
        _print(args, result)
    return 0


def measure(args: argparse.Namespace, report: Any) -> dict[str, Any]:
    """The JSON object of `eval`: the measures over all texts, and under `texts` those of each where there are several."""
    from halfplate.calibration import read_text
    from halfplate.evaluation.perplexity import evaluate, token_windows
    from halfplate.execution.held_out import held_out_tokens
    from halfplate.execution.loading import calibration_seed, load_any
    from halfplate.models.sources import is_compressed

    sampler = args.against or args.model
    if args.text is None and is_compressed(sampler) and not args.tasks:
        raise HalfplateError(
            f"text=None: {sampler!r} is compressed, so no dense model is at hand to sample held-out text from; give --text FILE or --against DENSE"
        )
    if args.tasks is not None:
        from halfplate.evaluation.tasks import check_available

        check_available()
    documents = {name: read_text(source, "text") for name, source in _names(args.text or []).items()}

    report("reading", 0, 1)
    model, tokenizer = load_any(args.model, activations=args.activations)
    against, against_tokenizer = load_any(args.against) if args.against else (None, None)
    if against is not None and against.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise HalfplateError(
            f"against={args.against!r} has another vocabulary than {args.model!r}; give the dense model that it was compressed from"
        )
    report("reading", 1, 1)
    tasks = _tasks(args, model, tokenizer, report)
    if tasks and args.text is None and args.against is None:
        return tasks
    seq_len = _seq_len(args, model)

    def scored(windows: Any, what: str) -> dict[str, Any]:
        measures: dict[str, Any] = evaluate(model, windows, against, lambda done, total: report(what, done, total))
        return measures

    if args.text is None:
        count = args.windows or SELF_WINDOWS
        held_out = held_out_tokens(
            against or model, against_tokenizer or tokenizer, calibration_seed(args.model), count, seq_len, report
        )
        return scored(held_out.ids, "evaluating") | {"protocol": held_out.protocol()} | tasks
    windows = {name: token_windows(tokenizer, texts, seq_len, args.windows) for name, texts in documents.items()}
    results = {name: scored(cut, f"evaluating {name}") for name, cut in windows.items()}
    if len(results) == 1:
        return next(iter(results.values())) | tasks
    return _together(list(results.values())) | {"texts": results} | tasks


def _tasks(args: argparse.Namespace, model: Any, tokenizer: Any, report: Any) -> dict[str, Any]:
    """The scores under `tasks`, or nothing where none were asked for."""
    if args.tasks is None:
        return {}
    from halfplate.evaluation.tasks import evaluate_tasks

    report("tasks", 0, 1)
    found = evaluate_tasks(
        model, tokenizer, [name for name in args.tasks.split(",") if name], args.tasks_folder, args.limit
    )
    report("tasks", 1, 1)
    return {"tasks": found}


def _seq_len(args: argparse.Namespace, model: Any) -> int:
    if args.seq_len is None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or SEQ_LEN
        return int(min(SELF_SEQ_LEN if args.text is None else SEQ_LEN, limit))
    from halfplate.calibration.text import check_seq_len

    check_seq_len(model, args.seq_len, least=2)
    return int(args.seq_len)


def _names(sources: list[str]) -> dict[str, str]:
    """A short name for each text: its file name without suffixes, with its folder's where that is not unique."""

    def short(source: str) -> str:
        name = Path(source).name
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
    """Measures over several texts as if over one: every scored token counts the same."""
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


def _print(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from halfplate.cli.console import print_table

    if "tasks" in result:
        measures = list(dict.fromkeys(key for found in result["tasks"].values() for key in found))
        print_table(
            f"{args.model}, by lm-eval",
            ("task", *(key.replace("_", " ") for key in measures)),
            [(name, *(found.get(key) for key in measures)) for name, found in result["tasks"].items()],
        )
    if "tokens" not in result:
        return
    keys = [key for key in ("perplexity", "dense_perplexity", *MEANS, "tokens", "windows", "seq_len") if key in result]
    rows = [(name, *(measures[key] for key in keys)) for name, measures in result.get("texts", {}).items()]
    rows.append(
        (
            "all" if rows else "held-out, self-generated" if args.text is None else args.text[0],
            *(result[key] for key in keys),
        )
    )
    print_table(
        args.model + (f" against {args.against}" if args.against else ""),
        ("text", *(key.replace("_", " ") for key in keys)),
        rows,
    )
    if "protocol" in result:
        print("text: " + ", ".join(f"{key} {value}" for key, value in result["protocol"].items()))
