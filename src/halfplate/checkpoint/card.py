"""The model card of a result folder: its content, the measurements with their protocol, and how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from halfplate.checkpoint.config import CONFIG_FILE, METHOD, read_json, read_specs
from halfplate.checkpoint.weights import read_headers
from halfplate.formats import WeightSpec

CARD_FILE = "README.md"
NOT_MEASURED = "not measured"
MEASURES = {
    "kl": "KL to the original model, nats per token",
    "top1_agreement": "share of tokens with the same most likely next token as the original",
    "perplexity": "perplexity",
    "dense_perplexity": "perplexity of the original model",
    "tokens": "tokens scored",
    "windows": "windows",
    "seq_len": "tokens per window",
}
LOADING = """\
```python
import halfplate  # registers the format with transformers
from transformers import AUTO, AutoTokenizer

model = AUTO.from_pretrained(FOLDER)  # this folder, or where it was uploaded to
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Run `pip install halfplate` first. Without `import halfplate`, transformers does not load this folder and says why.

vLLM serves it on CPUs if Halfplate is installed beside it. Otherwise vLLM ends with `Unknown quantization method: halfplate`; `pip install halfplate` cures that.
"""
LOADING_DENSE = """\
```python
from transformers import AUTO, AutoTokenizer

model = AUTO.from_pretrained(FOLDER)  # this folder, or where it was uploaded to
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

KIND It does not need Halfplate.
"""
FULL_SIZE = "This is an ordinary model of full size, and has the speed of the original."
SMALLER = "This is an ordinary model with fewer parameters than the original."


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md` from the content of `folder` and from `record`, the content of its `halfplate.json`."""
    (folder / CARD_FILE).write_text(model_card(folder, record), encoding="utf-8")


def model_card(folder: Path, record: Mapping[str, Any]) -> str:
    """The card as Markdown, with the metadata for the Hugging Face Hub; equal folders give equal cards."""
    quantization = read_json(folder / CONFIG_FILE).get("quantization_config")
    compressed = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    specs = read_specs(folder) if compressed else {}
    base = _words(record.get("model")) or "a model"
    pruned = record.get("pruned")
    kind = "compressed by Halfplate" if specs else "pruned by Halfplate" if pruned else "an uncompressed copy"
    parts = [_front_matter(record, bool(specs)), f"# {Path(base).name}, {kind}"]
    if isinstance(pruned, Mapping) and not specs:
        parts += [_table(("", ""), _pruned(record, base, pruned)), "## Quality", _quality(record)]
    elif specs:
        parts += [_what(record, base, specs), "## Bytes", _bytes(folder, specs), "## Quality", _quality(record)]
    else:
        parts.append(f"Written by Halfplate from `{Path(base).name}`.")
    parts += ["## Loading", _loading(folder, bool(specs), bool(pruned)), "## Licence", _licence(record)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _pruned(record: Mapping[str, Any], base: str, pruned: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = pruned.get("transforms")
    return [
        ("base model", f"`{Path(base).name}`"),
        ("transforms", ", ".join(f"`{_words(name)}`" for name in names) if isinstance(names, list) else "not recorded"),
        ("what stays", _words(pruned.get("told"))),
        ("parameters", f"{_words(pruned.get('parameters'))} of {_words(pruned.get('dense_parameters'))}"),
        ("calibration", _calibration(record.get("calibration")) or "none"),
    ]


def _loading(folder: Path, compressed: bool, pruned: bool) -> str:
    """How to load the model, with the class that loads all its parts."""
    entries = read_json(folder / CONFIG_FILE)
    parts = any(isinstance(entries.get(key), dict) for key in ("vision_config", "audio_config", "text_config"))
    auto = "AutoModelForMultimodalLM" if parts else "AutoModelForCausalLM"
    text = LOADING if compressed else LOADING_DENSE.replace("KIND", SMALLER if pruned else FULL_SIZE)
    return text.replace("AUTO", auto)


def _front_matter(record: Mapping[str, Any], compressed: bool) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["halfplate"]}
    recipe = record.get("recipe")
    if compressed and isinstance(recipe, Mapping):
        data["tags"] += [str(recipe[key]) for key in ("method", "pattern") if key in recipe]
    if on_hub := _words(record.get("base_model")):
        data["base_model"] = on_hub
    if licence := _words(record.get("license")):
        data["license"] = licence
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def _what(record: Mapping[str, Any], base: str, specs: Mapping[str, WeightSpec]) -> str:
    recipe = record.get("recipe")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    kinds = Counter((str(spec.pattern), spec.core_dtype, spec.in_block) for spec in specs.values())
    rows = [
        ("base model", f"`{Path(base).name}`"),
        ("method", f"`{_words(recipe.get('method')) or 'not recorded'}`"),
        ("calibration", _calibration(record.get("calibration")) or "none"),
        *(
            (
                f"{count} matrices",
                f"{pattern}, values in {dtype}" + (f", wrappers with blocks of {block}" if block else ""),
            )
            for (pattern, dtype, block), count in kinds.most_common()
        ),
    ]
    transforms = recipe.get("transforms")
    if isinstance(transforms, list) and transforms:
        rows.insert(1, ("transforms before compression", ", ".join(f"`{_words(name)}`" for name in transforms)))
    notes = record.get("notes")
    rows += [("note", _words(note)) for note in notes] if isinstance(notes, list) else []
    skipped = record.get("skipped")
    if isinstance(skipped, Mapping) and skipped:
        rows.append((f"{len(skipped)} matrices", "not compressed; the reasons are in `halfplate.json`"))
    if tuned := _tuned(record):
        won = sum(after < before for before, after in tuned)
        rows.append(("tuned", f"{won} of {len(tuned)} layers are closer to the original, masks fixed"))
    for recovery in record.get("recoveries") or ():
        rows.append(("recovered", f"{recovery.get('steps')} steps, {recovery.get('tokens')} tokens, masks fixed"))
    return _table(("", ""), rows) + "\n\n`halfplate.json` contains the whole recipe and the error of each matrix."


def _tuned(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The errors of each tuned layer before and after tuning."""
    blocks = record.get("tuned_blocks")
    ends = [
        (block.get("before"), block.get("after"))
        for block in (blocks.values() if isinstance(blocks, Mapping) else ())
        if isinstance(block, Mapping)
    ]
    return [(a, b) for a, b in ends if isinstance(a, int | float) and isinstance(b, int | float)]


def _bytes(folder: Path, specs: Mapping[str, WeightSpec]) -> str:
    nbytes = sum(spec.nbytes for spec in specs.values())
    dense = sum(spec.dense_nbytes for spec in specs.values())
    everything = sum(tensor.nbytes for tensor in read_headers(folder).values())
    rows = [
        ("compressed matrices", f"{nbytes:,}", f"{dense:,}", f"{nbytes / dense:.3f}"),
        ("everything else", f"{everything - nbytes:,}", "the same", "1"),
    ]
    return _table(("", "bytes", "original, 2 bytes per weight", "share"), rows)


def _quality(record: Mapping[str, Any]) -> str:
    rows = []
    matrices = record.get("matrices")
    found = [
        (matrix["relative_error"], matrix.get("error_kind", "unknown weighting"))
        for matrix in (matrices.values() if isinstance(matrices, Mapping) else ())
        if isinstance(matrix, Mapping) and isinstance(matrix.get("relative_error"), int | float)
    ]
    if found:
        kinds = ", ".join(sorted({str(kind) for _, kind in found}))
        mean = sum(error for error, _ in found) / len(found)
        when = ", before tuning" if _tuned(record) else ""
        rows.append((f"mean relative error of the matrices on their calibration inputs{when} ({kinds})", f"{mean:.4g}"))
    held_out = record.get("held_out")
    if isinstance(held_out, Mapping):
        rows += [(text, _number(held_out[key])) for key, text in MEASURES.items() if key in held_out]
        protocol = _pairs(held_out.get("protocol")) or "not recorded"
        note = f"KL, agreement and perplexity are measured on text held out from calibration: {protocol}."
    else:
        rows.append(("KL to the original model, perplexity, tasks", NOT_MEASURED))
        note = "`halfplate eval FOLDER --against ORIGINAL --text FILE` measures them."
    return _table(("measure", "value"), rows) + f"\n\n{note}"


def _licence(record: Mapping[str, Any]) -> str:
    licence = _words(record.get("license"))
    if licence:
        return f"The licence of the base model is `{licence}`. It also applies to this compressed form."
    return (
        "The files of the base model name no licence. The terms of the base model also apply to this compressed form."
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _calibration(protocol: Any) -> str:
    """The protocol of the calibration; of several sources the sequences of each."""
    if not isinstance(protocol, Mapping) or not isinstance(protocol.get("sources"), list):
        return _pairs(protocol)
    texts = [text for text in protocol["sources"] if isinstance(text, Mapping)]
    shares = ", ".join(f"{_words(text.get('samples'))} of {_words(text.get('source'))}" for text in texts)
    return f"{_pairs({key: value for key, value in protocol.items() if key != 'sources'})} (sequences: {shares})"


def _pairs(values: Any) -> str:
    return ", ".join(f"{key} {_words(value)}" for key, value in values.items()) if isinstance(values, Mapping) else ""


def _words(value: Any) -> str:
    """A value as one line of text that cannot end a code span."""
    return "" if value is None else " ".join(str(value).replace("`", "'").split())


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else "not finite"
