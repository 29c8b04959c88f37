"""Making the model of a row, and measuring it: quality, tasks and decoding."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp_model
import peers
import torch
from common import DATA, ROOT, machine
from quality_results import Results, plain, unchanged
from quality_rows import Compressed, Dense, LlamaCpp, Recovered, Rounded, Row, Run
from quality_subjects import CHECKPOINTS, Subject
from torch import Tensor
from transformers import PreTrainedModel

import halfplate
from halfplate.calibration import calibration_tokens, collect_block
from halfplate.checkpoint.config import other_dtype, read_record, read_specs
from halfplate.checkpoint.read import load, load_tokenizer
from halfplate.checkpoint.write import write_checkpoint
from halfplate.errors import RuinedResult
from halfplate.evaluation import bench as benching
from halfplate.evaluation import evaluate, speed, token_windows
from halfplate.evaluation.tasks import evaluate_tasks
from halfplate.formats import CompressedLinear
from halfplate.formats.parts.core import NMSparse
from halfplate.methods.solving import relative_error
from halfplate.models.blockwise import BlockwiseModel
from halfplate.models.gguf_writer import write_gguf
from halfplate.models.linears import find_linears, replace_linear
from halfplate.models.sources import LoadedModel, load_dense
from halfplate.recipe import Recipe
from halfplate.recovery.settings import Recovery
from halfplate.statistics import InputStatistics, Statistic
from halfplate.telemetry import machine as this_machine

TASKS = ("piqa", "arc_easy", "openbookqa", "hellaswag")
TOKEN_LIMIT = 10.0  # in the layer error on held-out text, as in calibration
ROUNDS, PROMPT, NEW_TOKENS = 5, 128, 64


class Remembered:
    """The dense model, which runs its blocks on each batch of windows once; only the head is computed again.

    The logits of 16 windows of SmolLM2 are 3.2 GB, what enters the head is 38 MB.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.hidden: dict[bytes, Tensor] = {}
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.hidden:
            base: Any = self.model.base_model
            self.hidden[key] = base(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        return SimpleNamespace(logits=head(self.hidden[key]))


class Bench:
    """The dense model of a subject, what is computed of it once, and the checkpoints of its rows."""

    def __init__(
        self, subject: Subject, table: Mapping[str, Row], made: Mapping[str, dict[str, Any]], results: Results
    ) -> None:
        self.subject, self._table, self._made, self._results = subject, table, made, results
        self._source = str(subject.source())
        self._seen: dict[str, dict[str, InputStatistics]] = {}  # by the sha256 of a calibration text

    # Protocols: what a measure means besides the row. A change of one makes the stage stale.

    def quality_protocol(self) -> dict[str, Any]:
        windows = {name: text.windows for name, text in self.subject.texts.items()}
        return {"version": 1, "seq_len": self.subject.seq_len, "windows": windows, "layer_error": "valid"}

    def fit_protocol(self) -> dict[str, Any]:
        return {"version": 1, "layer_error": "calibration text"}

    def tasks_protocol(self, limit: int) -> dict[str, Any]:
        return {"version": 1, "limit": limit, "products": "bf16, sums fp32"}

    def decode_protocol(self) -> dict[str, Any]:
        return {"version": 1, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "threads": torch.get_num_threads()}

    # Making.

    def make(self, row: Row) -> Path:
        """The folder of the row's checkpoint or GGUF file, made where it is not there; what its making cost is kept.

        Raises HalfplateError where Halfplate refuses the row.
        """
        if isinstance(row.making, Dense):
            return Path(self._source)
        if isinstance(row.making, Run):
            return self.make(self._table[row.making.parent])
        folder, mark, made = self._folder(row), self._mark(row), self._made[row.label]
        if folder.is_dir() and mark.is_file():
            kept = json.loads(mark.read_text())
            facts = kept.pop("facts", None)
            if unchanged(kept, made):
                if facts and self._results.stage(row.label, "compression", made) is None:
                    self._results.save(row.label, "compression", made, facts, {"version": 1})
                return folder
        self.drop(row)
        folder.parent.mkdir(parents=True, exist_ok=True)
        parent = self.make(self._table[row.parent]) if row.parent is not None else None
        before, start = [round(load, 1) for load in os.getloadavg()], time.perf_counter()
        facts = self._make(row, folder, parent)
        facts |= {"seconds": time.perf_counter() - start, "load_before": before, "machine": machine()}
        self._results.save(row.label, "compression", made, facts, {"version": 1})
        mark.write_text(json.dumps(plain({**made, "facts": facts})))
        return folder

    def drop(self, row: Row) -> None:
        """Delete the checkpoint of a row."""
        self._mark(row).unlink(missing_ok=True)
        folder = self._folder(row)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.log.jsonl").unlink(missing_ok=True)  # of a run that did not end

    def _folder(self, row: Row) -> Path:
        name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in row.label)
        return CHECKPOINTS / self.subject.name / name

    def _mark(self, row: Row) -> Path:
        """What says that the checkpoint is whole, and of what row."""
        folder = self._folder(row)
        return folder.with_name(f"{folder.name}.json")

    def _make(self, row: Row, folder: Path, parent: Path | None) -> dict[str, Any]:
        match row.making:
            case LlamaCpp(kind):
                return self._llama_cpp(folder, kind)
            case Compressed(recipe):
                return self._compress(folder, recipe)
            case Recovered(settings=settings):
                assert parent is not None
                return self._recover(parent, folder, settings)
            case Rounded(core_dtype=core_dtype):
                assert parent is not None
                return _round(parent, folder, core_dtype)
        raise AssertionError(row.making)

    def _compress(self, folder: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
        calibration = self.subject.calibration_source(stated["calibration"])
        recipe = Recipe.from_mapping({**stated, "calibration": calibration})
        summary = halfplate.compress(self._source, folder, recipe, overwrite=True, report=_tell)
        protocol = summary["calibration"] or {}
        kinds = {matrix["error_kind"] for matrix in summary["matrices"]}
        return {
            "tokens": protocol.get("tokens", 0),
            "text": stated["calibration"] if protocol else None,
            "phases": summary["seconds"],
            "block_size": summary["block_size"],
            "layer_error": summary["mean_relative_error"],
            "error_kind": kinds.pop() if len(kinds) == 1 else "mixed",
            "levels": summary["levels"],
        }

    def _recover(self, parent: Path, folder: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
        source = self.subject.calibration_source(stated.get("text", "self"))
        note = None
        try:
            summary = halfplate.recover(
                parent, self._source, folder, Recovery(**{**stated, "text": source}), resume=True, report=_tell
            )
        except RuinedResult as ruined:
            note, summary = str(ruined), read_record(folder)["recoveries"][-1]
        assert summary is not None
        return {
            "tokens": summary["tokens"],
            "text": stated.get("text", "self"),
            "phases": summary.get("seconds"),
            "trained_parameters": summary["trained_parameters"],
            "note": note,
        }

    def _llama_cpp(self, folder: Path, kind: str) -> dict[str, Any]:
        folder.mkdir()
        full, file = folder / "f16.gguf", folder / "model.gguf"
        write_gguf(self.dense.model, None, full)  # token ids are numbers in it
        llama_cpp_model.quantise(full, file, kind)
        full.unlink()
        return {}

    # Measuring.

    @cached_property
    def dense(self) -> LoadedModel:
        return load_dense(self._source)

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        texts, tokenizer = self.subject.texts, self.dense.tokenizer
        return {
            name: token_windows(tokenizer, text.documents(), self.subject.seq_len, text.windows)
            for name, text in texts.items()
        }

    @cached_property
    def remembered(self) -> Any:
        return Remembered(self.dense.model)

    def quality(self, row: Row, path: Path) -> dict[str, Any]:
        """Bytes of the linears, layer error on held-out text, and perplexity, KL and agreement on every text."""
        dense_nbytes = sum(2 * linear.d_out * linear.d_in for linear in find_linears(self.dense.model)[0])
        found: dict[str, Any] = {"nbytes": dense_nbytes, "dense_nbytes": dense_nbytes}
        if isinstance(row.making, LlamaCpp):
            found |= llama_cpp_model.contents(path / "model.gguf")
        elif not isinstance(row.making, Dense):
            found["nbytes"] = sum(spec.nbytes for spec in read_specs(path).values())
            found["layer_error"] = self._layer_error(path, self._held_out)
        with self._answering(row, path) as model:
            for name, windows in self.windows.items():
                against = None if isinstance(row.making, Dense) else self.remembered
                scores = evaluate(model, windows, against)
                kept = ("perplexity", "kl", "top1_agreement")
                found[name] = {key: _finite(scores[key]) for key in kept if key in scores}
                print(f"  {name}: {found[name]}", flush=True)
        return found

    @contextmanager
    def _answering(self, row: Row, path: Path) -> Iterator[Any]:
        """The model of a row as a user runs it."""
        if isinstance(row.making, Dense):
            yield self.remembered
        elif isinstance(row.making, LlamaCpp):
            threads = torch.get_num_threads()
            peer = llama_cpp_model.LlamaCppLogits(
                path / "model.gguf", self.dense.model.config, self.subject.seq_len, threads
            )
            try:
                yield peer
            finally:
                peer.close()
        else:
            model = halfplate.load(path, activations=_activations(row))
            if any(isinstance(module, CompressedLinear) for module in model.modules()):
                # A matrix without a kernel is built anew for each batch; once is enough.
                model = load(path, kernels=False).dequantize(dtype=torch.float32)
            yield model

    @cached_property
    def _held_out(self) -> dict[str, InputStatistics]:
        """Second moments of the inputs of every linear of the dense model on the windows of `valid`."""
        return self._moments(self.windows["valid"])

    def _moments(self, ids: Tensor) -> dict[str, InputStatistics]:
        blockwise = BlockwiseModel(self.dense.model)
        linears, _ = find_linears(self.dense.model)
        inputs = [blockwise.embed(batch) for batch in ids.split(max(1, 1024 // ids.shape[1]))]
        found: dict[str, InputStatistics] = {}
        for index in range(len(blockwise.blocks)):
            names = [linear.name for linear in linears if linear.block == index]
            collected, inputs = collect_block(blockwise, index, inputs, names, Statistic.GRAM, TOKEN_LIMIT)
            single: dict[int, InputStatistics] = {}
            for name in names:
                shared = collected[name]
                single.setdefault(id(shared), InputStatistics(shared.tokens, None, shared.require_gram().float()))
                found[name] = single[id(shared)]
        return found

    def fit(self, row: Row, path: Path) -> dict[str, Any]:
        """The layer error on the text that the row was calibrated on: what its solver sees, with the same H for every objective.

        None for a row that was not compressed in one shot.
        """
        if not isinstance(row.making, Compressed):
            return {"layer_error": None}
        recipe = self._made[row.label]["recipe"]
        source = self.subject.calibration_source(recipe["calibration"])
        tokens = calibration_tokens(
            source, self.dense.model, self.dense.tokenizer, recipe["samples"], recipe["seq_len"], recipe["seed"]
        )
        text = tokens.protocol()["sha256"]
        if text not in self._seen:
            self._seen[text] = self._moments(tokens.ids)
        return {"layer_error": self._layer_error(path, self._seen[text])}

    @torch.no_grad()
    def _layer_error(self, folder: Path, statistics: Mapping[str, InputStatistics]) -> float:
        """Mean of tr(D H Dᵀ) / tr(W H Wᵀ) over the matrices, H of the inputs in the dense model."""
        errors = []
        for name, module in load(folder, kernels=False).named_modules():
            if isinstance(module, CompressedLinear):
                weight = self.dense.model.get_submodule(name).weight.detach()
                errors.append(relative_error(weight, module.matrix.dense(), statistics[name])[0])
        return sum(errors) / len(errors)

    def tasks(self, row: Row, path: Path, limit: int) -> dict[str, Any]:
        """Accuracies by task, of the dense matrices that the row stands for."""
        from halfplate.models import gguf

        if isinstance(row.making, Dense):
            model: Any = self.dense.model
        elif isinstance(row.making, LlamaCpp):
            model, _ = gguf.load_model(path / "model.gguf", row.label, self.dense.model.config)
        else:
            model = load(path, kernels=False).dequantize(dtype=torch.float32)
        os.environ.setdefault("HALFPLATE_TASK_DATA", str(DATA))
        names = [f"{task}_local" for task in TASKS]
        start = time.perf_counter()
        with _bf16_products():
            scores = evaluate_tasks(
                model, self.dense.tokenizer, names, str(ROOT / "benchmarks" / "tasks"), limit, batch_size=16
            )
        accuracies = {name.removesuffix("_local"): score for name, score in scores.items()}
        return {"accuracies": accuracies, "seconds": time.perf_counter() - start}

    def decode(self, row: Row, path: Path) -> dict[str, Any]:
        """Tokens a second beside the dense model, alternating, medians."""
        threads = torch.get_num_threads()
        if isinstance(row.making, LlamaCpp):
            found = self._decode_peer(path / "model.gguf", threads)
        else:
            dense = isinstance(row.making, Dense)
            model, against = (self._source, None) if dense else (str(path), self._source)
            found = halfplate.bench(
                model, against, PROMPT, NEW_TOKENS, threads, _activations(row), rounds=ROUNDS, loops=not dense
            )
        return {
            "decode": found["decode_tokens_per_s"],
            "prefill": found["prefill_tokens_per_s"],
            "dense_decode": found.get("dense", {}).get("decode_tokens_per_s"),
            "speedup": found.get("decode_speedup"),
            "over_same_loop": found.get("weights_speedup"),
            "machine": this_machine.machine(),
        }

    def _decode_peer(self, file: Path, threads: int) -> dict[str, Any]:
        """The same for a GGUF file, whose model halfplate.bench does not take."""
        peer = peers.LlamaCpp(file, threads)
        full = self.dense.model
        contenders = {
            "peer": peer,
            "fp32": benching.transformers_contender(full),
            "bf16": benching.transformers_contender(benching.cast_copy(full, torch.bfloat16)),
        }
        ids = speed.random_prompt(full.config.vocab_size, PROMPT)
        weights = speed.weight_bytes(full)
        try:
            for contender in contenders.values():
                contender(ids, benching.WARM_UP_TOKENS, lambda: None)
            entries = {name: benching.Entry(contender, weights) for name, contender in contenders.items()}
            rounds = benching.time_rounds(entries, ids, NEW_TOKENS, ROUNDS)
        finally:
            peer.close()
        figures = {name: rounds.figures(name, entry) for name, entry in entries.items()}
        best = max(("fp32", "bf16"), key=lambda name: figures[name]["decode_tokens_per_s"])
        ratio = speed.paired_ratio(rounds.decode("peer"), rounds.decode(best))
        return figures["peer"] | {"dense": figures[best], "decode_speedup": ratio}


def _round(parent: Path, folder: Path, core_dtype: str) -> dict[str, Any]:
    """Write the checkpoint `parent` to `folder` with its cores rounded to nearest."""
    model = load(parent, kernels=False)
    specs = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            chain = module.matrix
            spec = specs[name] = replace(module.spec, core_dtype=core_dtype)
            mask = None if spec.pattern.is_dense else chain.core.mask()
            core = NMSparse.from_dense(chain.core.dense(), mask, spec.pattern, core_dtype, spec.group)
            rounded = replace(chain, spec=spec, core=core)
            replace_linear(model, name, CompressedLinear.from_weight(rounded, spec, module.bias))
    write_checkpoint(model, load_tokenizer(parent), folder, specs, {"rounded": core_dtype}, other_dtype(parent))
    return {}


@contextmanager
def _bf16_products() -> Iterator[None]:
    """fp32 matrices are multiplied as bf16 with fp32 sums, where the processor has that (AMX, AVX-512 BF16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _activations(row: Row) -> str:
    return "int8" if isinstance(row.making, Run) else "float"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tell(phase: str, done: int, total: int, note: str = "", *_: Any) -> None:
    """A line at each quarter of a phase."""
    if done and done * 4 // total != (done - 1) * 4 // total:
        print(f"  {phase} {done}/{total} {note}", flush=True)
