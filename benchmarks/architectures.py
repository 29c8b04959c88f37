"""Every decoder-only architecture and every multimodal wrapper of the installed transformers, as a tiny random model: compressed, loaded, compared.

python benchmarks/architectures.py                      # all of them, in about 15 minutes on two cores; writes docs/architectures.md
python benchmarks/architectures.py --only llama gemma3 --verbose  # some of them, with the output of those that are not right

Each model is compressed with ARMOR 2:4 and unpruned to int8 and int4, in a process of its own. `right` means: `from_pretrained` and
`halfplate.load` give equal logits with and without kernels, those of int8 are near the original's, and tokens decoded with the cache
are those without it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import halfplate
from halfplate.compression.compress import compress
from halfplate.errors import HalfplateError
from halfplate.formats import CompressedLinear
from halfplate.models.arguments import cache_argument
from halfplate.models.linears import find_blocks
from halfplate.recipe import Recipe
from halfplate.runtime import decoder, greedy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from default_sizes import default_share  # noqa: E402

from conftest import TEXT, build_tokenizer  # noqa: E402  (the tests have the tiny models)
from tiny_models import build_model, text_models, wrappers  # noqa: E402
from tiny_traits import VOCABULARY  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
PATIENCE = 300  # seconds for one architecture
IDS = torch.arange(3, 19)[None]
RECIPES = {
    "armor 2:4": Recipe(
        method="armor", pattern="2:4", core_dtype="bf16", samples=4, seq_len=16, method_options={"iterations": 2}
    ),
    "int8": Recipe(method="rtn", pattern="dense", core_dtype="int8"),
    "int4": Recipe(method="rtn", pattern="dense", core_dtype="int4"),
}
PROMPTS = 6  # on which the original must give the same with and without its cache
TYPICAL, NEAR = 1e-3, 0.01  # largest relative difference of the logits of the median token, and KL of int8
STATES = ("right", "refused", "wrong", "traceback", "hung", "not built")
HEAD = """\
# Architectures

Every decoder-only architecture and every multimodal model that transformers {version} builds, tried as a tiny random model by
`python benchmarks/architectures.py`. Of {judged}: {spoken}. {unbuilt} more are not built, because the benchmark has no
configuration with which transformers runs them, or because they need another package.

- **right**: checkpoints of ARMOR 2:4, int8 and int4 load through transformers and `halfplate.load` and give the same logits with and
  without kernels. Those of int8 are near the original's (median KL below 0.01). Decoding with the cache gives the same tokens as decoding without it.
- **refused**: with one line that says what to do instead.
- **share**: compressed parameters, relative to all those of the decoder layers that run on a text, at the default sizes of the configuration,
  or of the tiny model if transformers cannot build that. The rest are routers, indexers, convolutions, and kinds of experts that are not known.

Layers that share their weights (`zamba`, `zamba2`) have each shared linear compressed once, for the text of all its uses; it is stored with the first
layer, and the others name it in [`same_as`](format.md). `--tune-block` and `--share-wrappers` would change one use only, so with them these
weights stay as they are. The attention experts of `jetmoe` stay as they are: their linears run in two
calls with attention between them, which the module that runs experts as linears cannot do.

Of a multimodal model, the language model inside is compressed. Vision and audio towers and projectors stay as they are. Processor files and the
chat template are copied. The text for the calibration has no images."""


@dataclass
class Outcome:
    """What became of one architecture. state: right, wrong, refused, traceback, hung or not built. share: compressed parameters over
    those of the decoder layers, at default sizes or, as `tiny_share`, of the tiny model. skipped: number of modules that stay as they are, by reason. kl: to the original, by recipe."""

    kind: str
    wrapper: bool
    state: str
    reason: str = ""
    share: float = 0.0
    tiny_share: float = 0.0
    decoding: str = ""
    kl: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Wrong(Exception):
    """A result that differs from the reference."""


def judge(kind: str, wrapper: bool, folder: Path) -> Outcome:
    """Build, compress and compare one architecture; raises whatever the package raises."""
    found = Outcome(kind, wrapper, "right")
    try:
        model = build_model(kind, wrapper)
    except Exception as error:
        return Outcome(kind, wrapper, "not built", one_line(error))
    tokenizer = build_tokenizer(VOCABULARY)
    try:
        model.save_pretrained(folder / "original")
        reference = type(model).from_pretrained(folder / "original", dtype=torch.float32).eval()
        with torch.no_grad():
            expected = reference(input_ids=IDS, use_cache=False).logits
            again = model(input_ids=IDS, use_cache=False).logits
        if not torch.allclose(expected, again, rtol=1e-3, atol=1e-3):
            return Outcome(kind, wrapper, "not built", "transformers itself does not save and load it")
    except Exception as error:
        expected, found.reason = None, one_line(error)
    tokenizer.save_pretrained(folder / "original")
    try:
        for name, recipe in RECIPES.items():
            summary = compressed(found, folder, name, recipe)
            if expected is None:
                raise Wrong(f"compressed, although transformers does not run it on a text ({found.reason})")
            found.skipped = dict(Counter(" ".join(entry["reason"].split()) for entry in summary["skipped"]))
            compare(found, model, expected, folder / name, name)
    except HalfplateError as error:
        found.state, found.reason = "refused", str(error)
        if "\n" in found.reason:
            found.state, found.reason = "traceback", f"a refusal of several lines: {one_line(error)}"
    return found


def compressed(found: Outcome, folder: Path, name: str, recipe: Recipe) -> dict[str, Any]:
    """Compress with text of the model's own, or with the sentences of the tests if it cannot write any."""
    model, out = str(folder / "original"), folder / name
    try:
        return compress(model, out, recipe, benchmark=False)
    except HalfplateError as error:
        if not str(error).startswith("calibration=self"):
            raise
    (folder / "text.txt").write_text(20 * TEXT)
    found.notes.append("needs a text to calibrate on")
    return compress(model, out, recipe, benchmark=False, calibration=str(folder / "text.txt"), overwrite=True)


@torch.no_grad()
def compare(found: Outcome, model: Any, expected: Any, out: Path, name: str) -> None:
    """Load the checkpoint `out` in every way and compare; raises Wrong."""
    auto = transformers.AutoModelForMultimodalLM if found.wrapper else transformers.AutoModelForCausalLM
    stored = auto.from_pretrained(out, dtype=torch.float32).eval()
    if type(stored).__name__ != type(model).__name__:
        raise Wrong(f"{auto.__name__} loads a {type(stored).__name__}, not a {type(model).__name__}")
    reference, fast = halfplate.load(out, kernels=False), halfplate.load(out)
    logits = [one(input_ids=IDS, use_cache=False).logits for one in (reference, stored, fast)]
    for way, other in (("from_pretrained", logits[1]), ("with kernels", logits[2])):
        error, typical = differences(other, logits[0])
        if not (error < 0.02 and typical < TYPICAL):
            raise Wrong(f"{name}: logits {way} differ by {error:.2g} ({typical:.2g} at half of the tokens)")
    found.kl[name] = divergence(logits[0], expected)
    if name == "int8" and not found.kl[name] < NEAR:
        raise Wrong(f"int8: KL {found.kl[name]:.2g} to the original")
    if name == "armor 2:4":
        found.tiny_share = compressed_share(reference, model)
        try:
            found.share = default_share(found.kind, found.wrapper)
        except Exception as error:  # transformers raises its own for each class
            found.share = found.tiny_share
            found.notes.append(f"share of the tiny model: {one_line(error)}")
        check_decoding(found, fast, model)


def check_decoding(found: Outcome, fast: Any, model: Any) -> None:
    """Compare greedy tokens with and without the cache, where the original gives the same for both."""

    def tokens(one: Any, cached: bool) -> list[int]:
        if cached:
            return greedy(one, IDS, 4)[0].tolist()
        ids = IDS
        for _ in range(4):
            ids = torch.cat([ids, one(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return ids[0].tolist()

    found.decoding = "native" if decoder.why_not(fast) is None else "transformers"
    try:
        works = tokens(model, True) == tokens(model, False) and cache_is_exact(model)
    except Exception:
        works = False
    if not works:
        found.decoding = "not compared: the cache of the original is unlike its whole pass"
    elif tokens(fast, True) != tokens(fast, False):
        raise Wrong("tokens decoded with the cache differ from those without")


def cache_is_exact(model: Any) -> bool:
    """Whether the original gives the same logits with and without its cache: an indexer chooses among equal scores, so not always."""
    for seed in range(PROMPTS):
        ids = torch.randint(3, VOCABULARY - 20, (1, IDS.shape[1] + 4), generator=torch.Generator().manual_seed(seed))
        name = cache_argument(model.forward)
        cache = getattr(model(input_ids=ids[:, :-4], use_cache=True), name, None)
        if cache is None:  # kept under another name
            return True
        for end in range(ids.shape[1] - 4, ids.shape[1]):
            found = model(input_ids=ids[:, end : end + 1], use_cache=True, **{name: cache}).logits[:, -1]
            expected = model(input_ids=ids[:, : end + 1], use_cache=False).logits[:, -1]
            if differences(found, expected)[0] > TYPICAL:
                return False
    return True


def differences(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The relative difference of all logits, and of those of the median token."""
    rows = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float((found - expected).norm() / expected.norm()), float(rows.median())


def divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    """KL of the median token: rounding sends single tokens of tiny models to other experts."""
    ours, theirs = found.float().log_softmax(-1), expected.float().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).median())


def compressed_share(compressed: Any, model: Any) -> float:
    """Values of compressed matrices over those of all matrices of the decoder layers."""
    prefix, blocks = find_blocks(model)
    whole = sum(parameter.numel() for parameter in blocks.parameters())
    taken = sum(one.spec.d_out * one.spec.d_in * getattr(one.spec, "experts", 1) for name, one in compressed.named_modules() if isinstance(one, CompressedLinear) and name.startswith(prefix))  # fmt: skip
    return taken / whole


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def in_a_process(kind: str, wrapper: bool, folder: Path) -> tuple[int, Path]:
    """Start `judge` in a process of its own; returns its id and the file that it writes its outcome to."""
    told = folder / "outcome.json"
    child = os.fork()
    if child:
        return child, told
    try:
        os.setsid()
        silence = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        begin = time.monotonic()
        try:
            found = judge(kind, wrapper, folder)
        except Wrong as error:
            found = Outcome(kind, wrapper, "wrong", str(error))
        except BaseException as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/halfplate/" in frame.filename]
            place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
            traceback.print_exc()
            found = Outcome(kind, wrapper, "traceback", one_line(error) + place)
        found.seconds = round(time.monotonic() - begin, 1)
        told.write_text(json.dumps(asdict(found)))
    finally:
        os._exit(0)


def run(names: list[tuple[str, bool]], jobs: int, told: Callable[[Outcome, str], None]) -> list[Outcome]:
    """Judge the architectures, `jobs` at a time; told: called with each outcome and the output of its process."""
    waiting, running, outcomes = list(names), {}, []
    with tempfile.TemporaryDirectory(prefix="halfplate-") as scratch:
        while waiting or running:
            while waiting and len(running) < jobs:
                kind, wrapper = waiting.pop(0)
                folder = Path(scratch) / f"{kind}-{'wrapper' if wrapper else 'text'}"
                folder.mkdir()
                child, file = in_a_process(kind, wrapper, folder)
                running[child] = kind, wrapper, folder, file, time.monotonic()
            for child, (kind, wrapper, folder, file, begin) in list(running.items()):
                done, _ = os.waitpid(child, os.WNOHANG)
                if not done and time.monotonic() - begin < PATIENCE:
                    continue
                if not done:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                found = Outcome(**json.loads(file.read_text())) if file.is_file() else Outcome(kind, wrapper, "hung" if not done else "traceback", f"no outcome after {PATIENCE} s" if not done else "the process died")  # fmt: skip
                output = (folder / "output.txt").read_text() if (folder / "output.txt").is_file() else ""
                told(found, output)
                outcomes.append(found)
                del running[child]
                for inside in sorted(folder.rglob("*"), reverse=True):
                    inside.unlink() if inside.is_file() or inside.is_symlink() else inside.rmdir()
            time.sleep(0.02)
    return outcomes


def everything() -> Iterator[tuple[str, bool]]:
    """Model types, and whether each is a wrapper. A type of both lists is one: its text model has a type of its own."""
    inside = set(wrappers())
    yield from ((kind, kind in inside) for kind in sorted({*text_models(), *inside}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="model types; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at a time")
    parser.add_argument(
        "--json", type=Path, help="file that keeps all outcomes; without --only, a run judges those that it lacks"
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="the page to write, once all architectures have an outcome"
    )
    parser.add_argument("--verbose", action="store_true", help="print the output of each that is not right")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()

    def told(found: Outcome, output: str) -> None:
        name = f"{found.kind}{' (wrapper)' if found.wrapper else ''}"
        print(f"{name}: {found.state} {found.reason[:300]} share {found.share:.2f} {found.seconds} s", flush=True)
        if options.verbose and found.state != "right":
            print(output)
        known[found.kind] = found
        if options.json:
            options.json.write_text(json.dumps([asdict(one) for one in known.values()], indent=1))

    known: dict[str, Outcome] = {}
    if options.json and options.json.is_file():
        known = {entry["kind"]: Outcome(**entry) for entry in json.loads(options.json.read_text())}
    names = list(everything())
    wanted = [
        (kind, wrapper) for kind, wrapper in names if (kind in options.only if options.only else kind not in known)
    ]
    run(wanted, options.jobs, told)
    print(dict(Counter(found.state for found in known.values())))
    if all(kind in known for kind, _ in names):
        options.page.write_text(page([known[kind] for kind, _ in names]))


def page(outcomes: list[Outcome]) -> str:
    """The page of the documentation: counts, and a row for each architecture."""
    counts = Counter(found.state for found in outcomes)
    spoken = ", ".join(f"{counts[state]} {state}" for state in STATES[:-1] if counts[state])
    judged, unbuilt = len(outcomes) - counts["not built"], counts["not built"]
    parts = [HEAD.format(version=transformers.__version__, judged=judged, spoken=spoken, unbuilt=unbuilt)]
    for title, wrapper in (("Text models", False), ("Multimodal models", True)):
        rows = [row(found) for found in outcomes if found.wrapper is wrapper and found.state != "not built"]
        header = "| model type | state | share | decoding | KL of int8 | notes |\n|---|---|---:|---|---:|---|"
        parts.append("\n".join([f"## {title}\n", header, *rows]))
    left = [f"- `{found.kind}`: {cut(found.reason)}" for found in outcomes if found.state == "not built"]
    if left:
        parts.append("\n".join(["## Not built\n", *left]))
    return "\n\n".join(parts) + "\n"


def row(found: Outcome) -> str:
    """A row of the table."""
    kl = f"{found.kl['int8']:.1g}" if "int8" in found.kl else ""
    notes = cut(found.reason) if found.reason else "; ".join(found.notes[:1])
    share = f"{found.share:.2f}" if found.share else ""
    return f"| `{found.kind}` | {found.state} | {share} | {found.decoding} | {kl} | {notes} |"


def cut(reason: str) -> str:
    """A reason without the folder of the trial, and without characters that break a table."""
    plain = re.sub(r"model='[^']*':? ?", "", reason).replace("|", "/").replace("<", "&lt;")
    return plain if len(plain) <= 220 else f"{plain[:220]}…"


if __name__ == "__main__":
    main()
