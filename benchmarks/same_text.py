"""Greedy text of one checkpoint in every program that runs it: section `same_text` of RESULTS.md.

    python benchmarks/same_text.py CHECKPOINT [--file EXPORT.gguf] [--vllm PYTHON] [--new-tokens 64]

Eight prompts are continued without a stop. What every program is compared with are the matrices multiplied out, in fp32, in transformers. Where
its text differs, the table has the first token that does, and how far the two tokens' logits are apart there in that model: a small number is a
tie that rounding decides, a large one would be an error. `--file` is the checkpoint's exact export, for llama.cpp (`pip install llama-cpp-python`),
which rounds the inputs of products to eight bits; so its text is also compared with that of the same model whose inputs are rounded in this way.
`--vllm` is the Python of an environment with vLLM and Halfplate (docs/vllm.md). Answers that are in the cache are not computed again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answers = list[list[int]]
REFERENCE = "multiplied out, transformers"
ROUNDED = "multiplied out, inputs rounded as in llama.cpp"
LLAMA = "llama.cpp, the exact file"


def by_transformers(model: Any, prompts: Answers, count: int) -> Answers:
    """The next `count` tokens of each prompt by `generate` of transformers."""
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        wanted = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **wanted)
        found.append(text[0, len(prompt) :].tolist())
    return found


def natively(folder: str, activations: str, prompts: Answers, count: int) -> Answers:
    """The same by the native decoder."""
    import torch

    import halfplate
    from halfplate.runtime import greedy

    model = halfplate.load(folder, activations=activations)
    return [greedy(model, torch.tensor([prompt]), count)[0, len(prompt) :].tolist() for prompt in prompts]


def in_torch(folder: str, prompts: Answers, count: int) -> Answers:
    """The same without kernels."""
    import halfplate

    return by_transformers(halfplate.load(folder, kernels=False), prompts, count)


def loaded_by_transformers(folder: str, prompts: Answers, count: int) -> Answers:
    """The same by `from_pretrained`, after `import halfplate`."""
    import torch
    from transformers import AutoModelForCausalLM

    import halfplate  # noqa: F401  registers its format

    return by_transformers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompts, count)


def rounded(model: Any, file: Path, prompts: Answers, count: int) -> Answers:
    """`by_transformers` with inputs rounded as llama.cpp does for the types in `file`."""
    from same_bytes import types_in_file

    from halfplate.exports.llama_logits import rounded_inputs
    from halfplate.models.gguf_families.table import family_of_model
    from halfplate.models.gguf_families.tensors import names_in_file

    of_file, family = types_in_file(file), family_of_model(model.config.model_type)
    kinds = {key: of_file.get(names_in_file(family, key)[0], "F32") for key in dict(model.named_parameters())}
    with rounded_inputs(model, kinds):
        return by_transformers(model, prompts, count)


def in_llama(file: Path, prompts: Answers, count: int) -> Answers:
    """The same by llama.cpp."""
    from peers import LlamaCpp

    peer, found = LlamaCpp(file, threads=1), []
    for prompt in prompts:
        found.append(peer.continued(prompt, count))
    peer.close()
    return found


def in_vllm(folder: str, prompts: Answers, count: int) -> Answers:
    """The same by vLLM, all prompts at once, in fp32; runs in its environment."""
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=len(prompts))
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def _in_environment(python: str, folder: str, prompts: Answers, count: int, out: Path) -> Answers:
    """`in_vllm` by another Python, which writes to `out`."""
    asked = out.with_suffix(".prompts.json")
    asked.write_text(json.dumps([folder, prompts, count]))
    # Rounded to int8, the tokens would depend on how many prompts run together.
    plain = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HALFPLATE_ACTIVATIONS": "float"}
    log = out.with_suffix(".log")
    with log.open("w") as to:
        done = subprocess.run(
            [python, __file__, "--asked", str(asked), str(out)], env=plain | os.environ, stdout=to, stderr=to
        )
    if done.returncode:
        raise SystemExit(f"vLLM failed; see {log}")
    found: Answers = json.loads(out.read_text())
    return found


def row(name: str, found: Answers, reference: Answers, gap: Callable[[int, int, int], float]) -> list[str]:
    """The cells of one program. gap: of the logits of the reference's token and another at the first place that differs, by prompt and place."""
    differing = []
    for number, (one, other) in enumerate(zip(found, reference, strict=True)):
        if one != other:
            place = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
            differing.append(f"prompt {number + 1}: token {place + 1}, {gap(number, place, one[place]):.2g}")
    return [name, f"{len(found) - len(differing)} of {len(found)}", "; ".join(differing) or "–"]


def measure(options: argparse.Namespace) -> None:
    """Ask every program, and write the section."""
    import torch
    from common import CACHE, PROMPTS, machine, table, write_section

    import halfplate
    from halfplate.checkpoint.read import load_tokenizer
    from halfplate.cli.console import silence_libraries

    silence_libraries()
    folder, count = str(Path(options.checkpoint).resolve()), options.new_tokens
    kept = CACHE / "same_text" / f"{Path(folder).name}_{count}"
    kept.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(folder)
    prompts: Answers = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    exact = halfplate.load(folder, kernels=False).dequantize(dtype=torch.float32)
    programs: dict[str, Callable[[], Answers]] = {
        REFERENCE: lambda: by_transformers(exact, prompts, count),
        "Halfplate, `--activations float`": lambda: natively(folder, "float", prompts, count),
        "Halfplate, `--activations auto`": lambda: natively(folder, "auto", prompts, count),
        "transformers, `from_pretrained`": lambda: loaded_by_transformers(folder, prompts, count),
    }
    if options.file is not None:
        programs[ROUNDED] = lambda: rounded(exact, options.file, prompts, count)
        programs[LLAMA] = lambda: in_llama(options.file, prompts, count)
    if options.vllm is not None:
        programs["vLLM, fp32"] = lambda: _in_environment(options.vllm, folder, prompts, count, kept / "in_vllm.json")
    # The slowest: it decodes every matrix at every token.
    programs["Halfplate, torch alone"] = lambda: in_torch(folder, prompts, count)

    answers = {}
    for name, ask in programs.items():
        file = kept / f"{name.replace('`', '').replace(' ', '_').replace(',', '')}.json"
        if not file.exists() and not options.table:
            file.write_text(json.dumps(ask()))
            print(f"{name} answered", flush=True)
        if file.exists():
            answers[name] = json.loads(file.read_text())

    def compared(name: str, found: Answers, reference: Answers) -> list[str]:
        def gap(number: int, place: int, other: int) -> float:
            mine = reference[number][place]
            with torch.inference_mode():
                logits = exact(torch.tensor([prompts[number] + reference[number][:place]])).logits[0, -1]
            return float(logits[mine] - logits[other])

        return row(name, found, reference, gap)

    rows = [compared(name, found, answers[REFERENCE]) for name, found in answers.items() if name != REFERENCE]
    if LLAMA in answers:
        rows.append(compared(f"{LLAMA}, against rounded inputs", answers[LLAMA], answers[ROUNDED]))
    said = f"`python benchmarks/same_text.py`, {count} tokens after each of {len(prompts)} prompts; {machine().partition(', load')[0]}."
    write_section(
        "same_text", f"{said}\n\n{table(['program', 'same text', 'first token that differs, gap of the logits'], rows)}"
    )


def main() -> None:
    """Measure, or answer in vLLM's environment."""
    if sys.argv[1:2] == ["--asked"]:
        asked, out = map(Path, sys.argv[2:4])
        out.write_text(json.dumps(in_vllm(*json.loads(asked.read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--file", type=Path, help="its exact export as a GGUF file")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--table", action="store_true", help="ask no program that has not answered")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
