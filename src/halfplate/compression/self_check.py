"""The self-check after a compression: compares the written checkpoint with the solved weights and with the original model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfplate.checkpoint.read import load, load_tokenizer, read_checked_headers
from halfplate.compression.run import Run
from halfplate.errors import HalfplateError, HalfplateWarning, RuinedResult
from halfplate.evaluation.perplexity import NONSENSE_KL, compare
from halfplate.formats import Chain, CompressedLinear, WeightSpec
from halfplate.models.arguments import cache_argument
from halfplate.models.blockwise import FAILURES, BlockwiseModel
from halfplate.models.context import positions
from halfplate.models.linears import replace_module
from halfplate.models.sources import Source
from halfplate.models.streamed import StreamedModel
from halfplate.planning.memory import check_loads_whole
from halfplate.runtime import decoder
from halfplate.runtime.prepare import accelerate_linears
from halfplate.storage.artifact import load_artifact
from halfplate.storage.tensor_file import read_tensor, read_tensors

TOKENS = 128
DECODED = 4  # tokens for the native decoder
LEAST_TOKENS = 16  # with fewer, the text says nothing, and tokens from the whole vocabulary are used
# For all logits: near-ties of a router differ for single tokens, and a GPU multiplies in half precision.
TOLERANCE = 0.02
# For the logits of the median token, in fp32. The kernels and torch differ by about 1e-5. A scale that is wrong by a
# tenth in one matrix differs by 4e-3 in a small model, and by less in a deep one.
TYPICAL_TOLERANCE = 1e-3
# What computes the logits of a model with its layers changed by each of some functions.
Compute = Callable[[StreamedModel, Tensor, list[Callable[[int], None]]], list[Tensor]]
FULL_PRECISION = ("none", "ieee")
# Plain words that the smallest models know.
TEXT = """Once there was an old lighthouse on a hill above the sea. Every evening Anna climbed the long stairs, lit the lamp and \
looked for ships. One day a little boy asked her, "Why do you do this every night?" Anna smiled. "Because somebody has to," she \
said. "When it is dark, the ships cannot see the rocks. The light tells them where the land is."

The next morning the sky was blue and the sun was warm. The children ran down to the beach to play in the sand, and the men \
mended their nets. The boy told his mother about the lamp. "I want to help Anna when I am big," he said. His mother was very happy \
and gave him a big hug. From that day on, the boy went to the lighthouse after school.
"""


@dataclass(frozen=True)
class SelfCheck:
    """The result of the self-check.

    kl: KL(original ‖ checkpoint), mean nats per token.
    top1_agreement: share of tokens with the same most likely next token.
    perplexity, dense_perplexity: of the checkpoint and of the original.
    logit_error: Frobenius norm of the difference between the logits of the checkpoint and of the solved weights, relative to the
        norm of the latter.
    tokens: number of scored tokens.
    loaded: `whole` if `halfplate.load` loaded it, or `by layer` if that would exceed the memory bound.
    """

    kl: float
    top1_agreement: float
    perplexity: float
    dense_perplexity: float
    logit_error: float
    tokens: int
    loaded: str

    @property
    def nonsense(self) -> bool:
        """Whether the KL is too high for sensible text."""
        return not self.kl <= NONSENSE_KL

    def to_json(self) -> dict[str, Any]:
        """The entry `check` of `halfplate.json` and of `compress --json`."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "text": "built-in",
            "nonsense": self.nonsense,
        }


@torch.no_grad()
def self_check(streamed: StreamedModel, run: Run, folder: Path, original: Source) -> SelfCheck:
    """Compare the checkpoint in `folder` with the solved weights and with the original model, on one short built-in text.

    The solved weights are multiplied out and run through the model's code, layer by layer.

    original: the model before its transforms.
    Raises RuinedResult if the checkpoint computes different logits, or values that are not finite.
    """
    ids = check_tokens(load_tokenizer(folder), streamed.model).to(streamed.device)
    specs = run.plan.specs
    whole = check_loads_whole(run.plan.sizes, list(specs.values()), run.plan.job)
    written = _Written(folder)
    variants: list[Callable[[int], None]] = [lambda index: _put_solved(streamed, run, index)]
    if not whole:
        variants.append(lambda index: written.put(streamed, index))
    same = original is streamed.source and not streamed.decoded
    other = None if same else StreamedModel(original, run.plan.recipe.device)

    def computed(compute: Compute) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the original, of the solved weights, and of the checkpoint."""
        found = compute(streamed, ids, [_unchanged, *variants] if other is None else variants)
        expected = found.pop(0) if other is None else compute(other, ids, [_unchanged])[0]
        return expected, found[0], found[1] if len(found) > 1 else loaded

    loaded = (
        _loaded_logits(folder, ids, run.plan.recipe.device)
        if whole
        else torch.empty(0, dtype=torch.float32, device="cpu")
    )
    if not whole:
        written.check_outer(streamed)
    exact = _in_full_precision(streamed)
    try:
        expected, solved, stored = computed(_logits)
        error = _checked_error(stored, solved, exact)
    except HalfplateError:
        # Of models whose layers are not a chain, such as loops, only the own forward pass gives the logits. It reads the layers once a variant.
        expected, solved, stored = computed(_logits_of_whole)
        error = _checked_error(stored, solved, exact)
    measures = compare(stored[:, :-1].flatten(0, 1), expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return SelfCheck(
        kl=_short(measures["kl"]),
        top1_agreement=_short(measures["top1_agreement"]),
        perplexity=_short(measures["perplexity"]),
        dense_perplexity=_short(measures["dense_perplexity"]),
        logit_error=_short(error),
        tokens=ids.shape[1] - 1,
        loaded="whole" if whole else "by layer",
    )


def _checked_error(stored: Tensor, solved: Tensor, exact: bool) -> float:
    """The Frobenius norm of the difference of logits, relative to that of `solved`, over all tokens.

    exact: whether both were multiplied in fp32.
    Raises RuinedResult if the difference is larger than rounding explains.
    """
    least = torch.finfo(torch.float32).tiny
    error = float((stored - solved).norm() / solved.norm().clamp_min(least))
    typical = ((stored - solved).norm(dim=-1) / solved.norm(dim=-1).clamp_min(least)).median()
    measures = [("", error, TOLERANCE), (" at half of the tokens", float(typical), TYPICAL_TOLERANCE)]
    for where, found, most in measures if exact else measures[:1]:
        if not found <= most:
            raise _ruined(
                f"the logits of the written checkpoint differ from those of the solved weights by {found:.2g} of their norm{where}, "
                f"expected at most {most}"
            )
    return error


def _in_full_precision(streamed: StreamedModel) -> bool:
    """Whether torch multiplies fp32 in full precision: on the CPU, unless the process allows less."""
    # Older versions of torch have no such setting.
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    return streamed.device.type == "cpu" and getattr(products, "fp32_precision", "ieee") in FULL_PRECISION


def _ruined(what: str) -> RuinedResult:
    return RuinedResult(
        f"self-check: {what}; nothing was written to OUT: run `halfplate doctor` and report this model, or skip the check with --no-check"
    )


def check_tokens(tokenizer: Any, model: Any) -> Tensor:
    """The tokens, int64 (1, at most TOKENS), of the built-in text that are in the model's vocabulary."""
    config = model.config.get_text_config()
    length = max(2, min(TOKENS, positions(model) or TOKENS))
    ids = [token for token in tokenizer(TEXT)["input_ids"] if token < config.vocab_size][:length]
    if len(ids) < min(LEAST_TOKENS, length):
        ids = [number * (config.vocab_size - 1) // (length - 1) for number in range(length)]
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def original_logits(streamed: StreamedModel, ids: Tensor) -> Tensor:
    """Logits fp32 (1, L, vocabulary) of a model as it is, with one layer in memory; ids int64 (1, L)."""
    (found,) = _logits(streamed, ids, [_unchanged])
    return found


def _unchanged(index: int) -> None:
    """Do not change a layer."""


def _logits(streamed: StreamedModel, ids: Tensor, variants: list[Callable[[int], None]]) -> list[Tensor]:
    """Logits fp32 (1, L, vocabulary) of the model with each decoder layer changed by each of `variants`, with one layer in memory."""
    blockwise = streamed.blockwise
    with streamed.outer(head=True), _in_fp32(blockwise):
        _round_outer(streamed)
        # Each variant has its own arguments, because layers may write into them (shared keys and values, caches).
        states = [streamed.embed(ids) for _ in variants]
        for index in range(len(streamed.blocks)):
            for number, variant in enumerate(variants):
                streamed.load_block(index)
                try:
                    variant(index)
                    states[number] = blockwise.run_block(index, states[number])
                finally:
                    streamed.free_block(index)
        return [blockwise.finish(state).float().cpu() for state in states]


def _logits_of_whole(streamed: StreamedModel, ids: Tensor, variants: list[Callable[[int], None]]) -> list[Tensor]:
    """`_logits` by the model's own forward pass, which may run layers in any order and use their outputs as it likes."""
    found = []
    for variant in variants:

        def run(index: int, *args: Any, variant: Callable[[int], None] = variant, **kwargs: Any) -> Any:
            block = streamed.load_block(index)
            block.__dict__.pop("forward", None)  # which called this function
            try:
                variant(index)
                return block(*args, **kwargs)
            finally:
                streamed.free_block(index)

        with streamed.outer(head=True):
            _round_outer(streamed)
            try:
                found.append(streamed.blockwise.logits(ids, run).float().cpu())
            except FAILURES as error:
                reason = " ".join(str(error).split())[:200]
                raise HalfplateError(
                    f"model {type(streamed.model).__name__} fails on the {ids.shape[1]} tokens of the self-check ({type(error).__name__}: {reason}); "
                    "check that it runs in transformers, or skip the check with --no-check"
                ) from error
    return found


@contextmanager
def _in_fp32(blockwise: BlockwiseModel) -> Iterator[None]:
    """Context manager in which matrix products run in fp32, because calibration may use bf16."""
    precision, blockwise.precision = blockwise.precision, "fp32"
    try:
        yield
    finally:
        blockwise.precision = precision


def _round_outer(streamed: StreamedModel) -> None:
    """Round the tensors outside the layers to their stored type."""
    tensors = streamed.model.state_dict(keep_vars=True)
    for name in streamed.outer_names:
        if tensors[name].is_floating_point() and not tensors[name].is_meta and name not in streamed.decoded:
            tensors[name].copy_(tensors[name].to(streamed.source.other_dtype))


def _put_solved(streamed: StreamedModel, run: Run, index: int) -> None:
    """Put the solved weights, multiplied out, into the layer; the original linears stay."""
    for name, path in run.borrowed(index).items():
        owner = run.plan.specs[name].same_as
        assert owner is not None
        lent, spec = load_artifact(path), run.plan.specs[owner]
        assert lent is not None, "the artifact of an earlier layer"
        parts = {key: read_tensor(lent.tensors[f"{owner}.{key}"]).to(streamed.device) for key in spec.layout()}
        cast(nn.Linear, streamed.model.get_submodule(name)).weight.copy_(Chain.from_tensors(spec, parts).dense())
    if not run.names.get(index):
        return
    artifact = load_artifact(run.work.layer(index))
    if artifact is None:
        raise HalfplateError(f"the finished file of layer {index} is missing; run the same command again with --resume")
    tensors = {name: read_tensor(stored).to(streamed.device) for name, stored in artifact.tensors.items()}
    layer, prefix = streamed.blocks[index], f"{streamed.prefix}.{index}."
    specs = {name: run.plan.specs[name] for name in run.names[index]}
    linears = _linears(specs, tensors, layer, prefix)
    state = dict(layer.state_dict(keep_vars=True))
    for name, tensor in tensors.items():
        if (inner := name.removeprefix(prefix)) in state and name.rpartition(".")[0] not in specs:
            state[inner].copy_(tensor)
    for name, module in linears.items():
        cast(nn.Linear, layer.get_submodule(name.removeprefix(prefix))).weight.copy_(module.matrix.dense())


def _linears(
    specs: Mapping[str, WeightSpec], tensors: Mapping[str, Tensor], layer: nn.Module, prefix: str
) -> dict[str, CompressedLinear]:
    """The compressed linears of a layer by full name, with their stored tensors."""
    linears = {}
    for name, spec in specs.items():
        stored = {key: tensors[f"{name}.{key}"] for key in spec.layout()}
        bias = cast(nn.Linear, layer.get_submodule(name.removeprefix(prefix))).bias
        linears[name] = CompressedLinear.from_stored(stored, spec, tensors.get(f"{name}.bias", bias))
    for module in linears.values():
        if module.spec.in_shared is not None:
            module.lend(linears[module.spec.in_shared])
    return linears


class _Written:
    """The checkpoint in a folder, read layer by layer."""

    def __init__(self, folder: Path) -> None:
        self._specs, self._found = read_checked_headers(folder)

    def check_outer(self, streamed: StreamedModel) -> None:
        """Raise RuinedResult unless the tensors outside the layers equal those of the original, in their stored type."""
        for name in streamed.outer_names:
            stored = self._read(name)
            if not torch.equal(stored, streamed.read(name).to("cpu", stored.dtype)):
                raise _ruined(f"{name} in the written checkpoint is not that of the original")

    def _read(self, name: str) -> Tensor:
        """The tensor `name` of the model, as it is stored or decoded."""
        module, _, leaf = name.rpartition(".")
        spec = self._specs.get(module)
        if spec is None or leaf != "weight":
            ((_, tensor),) = read_tensors({name: self._found[name]})
            return tensor
        tensors = dict(read_tensors({key: self._found[f"{module}.{key}"] for key in spec.layout()}))
        return Chain.from_tensors(spec, tensors).dense()

    def put(self, streamed: StreamedModel, index: int) -> None:
        """Put the stored tensors of the checkpoint into the layer, with its compressed linears on the fastest path."""
        prefix = f"{streamed.prefix}.{index}."
        layer = streamed.blocks[index]
        found = {name: stored for name, stored in self._found.items() if name.startswith(prefix)}
        specs = {name: spec for name, spec in self._specs.items() if name.startswith(prefix)}
        for name, spec in specs.items():
            if spec.same_as is not None:
                specs[name] = spec.alone
                found |= {f"{name}.{key}": self._found[f"{spec.same_as}.{key}"] for key in spec.alone.layout()}
        tensors = {name: tensor.to(streamed.device) for name, tensor in read_tensors(found)}
        state = dict(layer.state_dict(keep_vars=True))
        linears = _linears(specs, tensors, layer, prefix)
        for name, tensor in tensors.items():
            if (inner := name.removeprefix(prefix)) in state and name.rpartition(".")[0] not in specs:
                state[inner].copy_(tensor)
        for name, module in linears.items():
            replace_module(layer, name.removeprefix(prefix), module)
        accelerate_linears(layer)


def _loaded_logits(folder: Path, ids: Tensor, device: str) -> Tensor:
    """Logits of the checkpoint loaded by `halfplate.load`; the last tokens run one by one if decoding is native."""
    with warnings.catch_warnings():
        # Matrices without a kernel were reported at the start, and the folder is still temporary.
        warnings.simplefilter("ignore", HalfplateWarning)
        model: Any = load(folder, device=device, activations="float")
    if decoder.why_not(model) is not None or ids.shape[1] <= DECODED:
        return cast(Tensor, model(input_ids=ids, use_cache=False).logits).float().cpu()
    found = model(input_ids=ids[:, :-DECODED], use_cache=True)
    name = cache_argument(model.forward)
    cache, logits = {name: getattr(found, name)}, [found.logits]
    for token in ids[:, -DECODED:].split(1, dim=1):
        logits.append(model(input_ids=token, use_cache=True, **cache).logits)
    return torch.cat(logits, 1).float().cpu()


def _short(value: float) -> float:
    """Six digits, because more would differ between machines."""
    return float(f"{value:.6g}")
