"""The steps before the first layer: reading and checking the model, preparing the text, and choosing formats. Each is done once."""

from __future__ import annotations

from typing import Any

import torch

from halfplate.allocation.ratios import UNIFORM, WELORE
from halfplate.budgets.choose import allocate_plan
from halfplate.budgets.knee import find_knee
from halfplate.budgets.ranks import rank_plan
from halfplate.budgets.ratios import ratio_plan
from halfplate.calibration import CalibrationTokens, calibration_tokens
from halfplate.calibration.mixture import spoken
from halfplate.calibration.text import recorded_hashes, text_hashes
from halfplate.compression.work_folder import WorkFolder
from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.limits import check_resumed_threads, cores
from halfplate.models.chain_check import SAMPLES, check_chain
from halfplate.models.linears import find_linears
from halfplate.models.sources import LoadedModel, Source, load_tokenizer
from halfplate.models.streamed import StreamedModel
from halfplate.planning import Plan
from halfplate.planning.memory import sampling_room
from halfplate.planning.sizes import ModelSizes, sizes_of
from halfplate.recipe import Recipe
from halfplate.runtime.prepare import bf16_kernels
from halfplate.runtime.sampling import native_sampling
from halfplate.storage.artifact import Artifact, load_artifact, read_json, save_artifact, write_json
from halfplate.storage.tensor_file import read_tensor
from halfplate.telemetry.clock import Clock
from halfplate.telemetry.progress import Report

FEW = 16  # number of tokens of a trial text before the real one


def fixed_threads(recipe: Recipe, work: WorkFolder, resume: bool) -> int:
    """The number of threads of every task. A resumed run keeps it unless the recipe sets another, because the result depends on it."""
    begun = work.begun() if resume else None
    if recipe.threads is None and begun is not None:
        check_resumed_threads(int(begun["threads"]))
        return int(begun["threads"])
    return recipe.threads or min(torch.get_num_threads(), cores())


def check_weights(streamed: StreamedModel, work: WorkFolder, clock: Clock, report: Report) -> None:
    """Read every tensor once, so that NaN in the last layer is found before hours of work on the others."""
    done = work.path / "checked.json"
    if read_json(done) is not None:
        return
    with clock("reading"):
        report("reading", 0, len(streamed.stored))
        for number, name in enumerate(streamed.stored, start=1):
            streamed.read(name)
            report("reading", number, len(streamed.stored))
    write_json(done, {"finite": True}, durable=False)


def check_layers(
    streamed: StreamedModel, plan: Plan, tokens: CalibrationTokens, work: WorkFolder, clock: Clock, report: Report
) -> None:
    """Compare running layer by layer with the whole forward pass on the first tokens; a resumed run does not repeat this."""
    done = work.path / "compared.json"
    shared = next((name for name in streamed.tied if name.startswith(f"{streamed.prefix}.")), None)
    if plan.recipe.tune_block and shared is not None:
        raise HalfplateError(
            f"tune_block={plan.recipe.tune_block}: {shared} is also part of another layer, so the layers cannot be tuned one by one; leave it out"
        )
    if read_json(done) is not None:
        return
    with clock("statistics"):
        report("comparing layers", 0, 1)
        check_chain(streamed, tokens.ids, _splits(plan.recipe))
        report("comparing layers", 1, 1)
    write_json(done, {"tokens": tokens.protocol()["sha256"]}, durable=False)


def _splits(recipe: Recipe) -> str | None:
    """The option of a recipe that splits batches into samples."""
    if recipe.tune_block:
        return f"tune_block={recipe.tune_block}"
    return f"search={recipe.search!r}" if recipe.budgeted and recipe.evolution is not None else None


def prepared_tokens(
    streamed: StreamedModel, recipe: Recipe, work: WorkFolder, report: Report, sizes: ModelSizes | None = None
) -> CalibrationTokens:
    """The calibration tokens, kept in the work folder. Tokens from a text are read again on resume and must be equal.

    sizes: of the model, for the memory in which it generates text; None to find them.
    """
    kept = load_artifact(work.tokens)
    tokenizer = load_tokenizer(streamed.source)
    if (
        kept is not None
        and kept.damaged() is None
        and recipe.sampled
        and _same_texts(streamed, recipe, tokenizer, kept)
    ):
        facts = {name: kept.facts[name] for name in ("source", "seed", "temperature", "start", "start_token")}
        told: dict[str, Any] = {name: kept.facts[name] for name in ("decoded_by", "sources") if name in kept.facts}
        return CalibrationTokens(read_tensor(kept.tensors["ids"]), **facts, facts=told)
    if sizes is None:
        sizes = sizes_of(streamed.model, find_linears(streamed.model)[0], recipe.seq_len)
    resident, cache = sampling_room(sizes, recipe.device)

    def tokens_of(model: Any) -> CalibrationTokens:
        return calibration_tokens(
            recipe.calibration,
            model,
            tokenizer,
            recipe.samples,
            recipe.seq_len,
            recipe.seed,
            lambda done, total: report("calibration text", done, total),
            cache,
            native_sampling if resident > 0 else None,
        )

    if recipe.sampled:
        # Sampling takes long, so a few tokens are tried first to find errors.
        few = torch.randint(
            sizes.vocabulary,
            (SAMPLES, min(recipe.seq_len, FEW)),
            generator=torch.Generator().manual_seed(0),
            dtype=torch.int64,
            device="cpu",
        )
        check_chain(streamed, few, _splits(recipe))
        with streamed.running(resident > 0, bf16_kernels(recipe.device)) as model:
            tokens = tokens_of(model)
    else:
        tokens = tokens_of(streamed.model)
    protocol = tokens.protocol()
    if kept is not None and kept.facts["sha256"] != protocol["sha256"]:
        raise HalfplateError(
            f"--resume: calibration={spoken(recipe.calibration)!r} had tokens with SHA-256 {kept.facts['sha256'][:16]} when the compression in "
            f"{str(work.path)!r} began and has {protocol['sha256'][:16]} now; give the same text again, or pass --overwrite instead of --resume to start over"
        )
    start = {name: getattr(tokens, name) for name in ("temperature", "start", "start_token")}
    save_artifact(work.tokens, {"ids": tokens.ids.contiguous()}, start | protocol)
    return tokens


def _same_texts(streamed: StreamedModel, recipe: Recipe, tokenizer: Any, kept: Artifact) -> bool:
    """Whether the texts beside the generated one give the tokens that were kept."""
    numbers = recipe.samples, recipe.seq_len, recipe.seed
    return text_hashes(recipe.calibration, streamed.model, tokenizer, *numbers) == recorded_hashes(kept.facts)


def chosen_levels(
    source: Source, plan: Plan, tokens: CalibrationTokens | None, work: WorkFolder, report: Report, clock: Clock
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the formats that a budget or the outliers of each layer choose, and the facts to record about this.

    A resumed run does not choose again, because some choices depend on measured times. Holds the whole model.

    source: its tensors can be read one by one.
    """
    recipe = plan.recipe
    if not recipe.budgeted and recipe.ratios == UNIFORM:
        return plan, {}
    kept = read_json(work.levels)
    if kept is None:
        assert tokens is not None
        # If the chosen formats of an earlier run were lost, its hidden states may belong to other formats.
        work.remove_hidden()
        told = dict[str, Any]()
        with StreamedModel(source, recipe.device).running(held=True) as model:
            # Including buffers, which are computed and not read.
            torch.nn.Module.to(model, recipe.device)
            loaded = LoadedModel(model, load_tokenizer(source), source)
            if recipe.budgeted:
                plan, search = allocate_plan(loaded, plan, tokens, report, clock)
                told |= {} if search is None else {"search": search}
            if recipe.ratios == WELORE:
                plan = rank_plan(loaded, plan, report, clock)
            elif recipe.ratios != UNIFORM:
                plan, ratios = ratio_plan(loaded, plan, tokens, report, clock)
                told["ratios"] = [ratio.to_json() for ratio in ratios]
            if recipe.ratios == "essential":
                assert tokens is not None
                with clock("choosing ratios"):
                    ids = tokens.ids.to(recipe.device)
                    # The last to use this model, whose weights it removes.
                    told["knee"] = find_knee(model, list(plan.specs), ids, report).to_json()
        plan = plan.following()
        write_json(work.levels, {"specs": {name: spec.to_json() for name, spec in plan.specs.items()}, "told": told})
        return plan, told
    specs = {name: WeightSpec.from_json(entry, name) for name, entry in kept["specs"].items()}
    return plan.without(plan.specs.keys() - specs.keys()).with_specs(specs), kept["told"]
