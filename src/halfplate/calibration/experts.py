"""Statistics of the inputs of each expert, from the recorded inputs of the experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from halfplate.calibration.collect import Sums, collect_block
from halfplate.errors import HalfplateError
from halfplate.models.blockwise import BlockInputs, BlockwiseModel
from halfplate.models.experts import Call, ExpertStage, LinearExperts, expert_stages, experts_of
from halfplate.statistics import InputStatistics, Statistic
from halfplate.storage.artifact import Artifact, load_artifact, save_artifact
from halfplate.storage.tensor_file import read_rows, read_tensor

ROWS = 4096  # tokens whose products are added at once
# The down projection of an expert is also evaluated on this many tokens per input, of all tokens of the layer.
SAMPLED = 4
HIDDEN, CHOSEN, GATES = "hidden", "chosen", "gates"
OWN, ORIGINAL = "own", "original"  # inputs in the model as it is compressed so far, and in the original model


@dataclass(frozen=True)
class Routed:
    """The tokens of one expert, by batch: int64 numbers of the rows of that batch.

    factors: fp32, by which the tokens of each batch are multiplied in the statistics; the mean of their squares is 1. None for equal tokens.
    """

    rows: Mapping[int, Tensor]
    factors: Mapping[int, Tensor] | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows.values()))


@dataclass(frozen=True)
class ExpertInputs:
    """The inputs of the experts of a layer and the experts of each token, in a file per batch and stream.

    folder: of the files.
    batches: their number.
    streams: OWN, and ORIGINAL if cross moments are collected.
    gated: the statistics of an expert weight each token by the square of its routing weight.
    """

    folder: Path
    batches: int
    streams: tuple[str, ...]
    gated: bool = False

    def write(self, stream: str, number: int, call: Call) -> None:
        """Write a batch: what the experts received."""
        tensors = {
            HIDDEN: call.hidden.float().cpu().contiguous(),
            CHOSEN: call.chosen.to("cpu", torch.int32).contiguous(),
        }
        if self.gated:
            tensors[GATES] = call.weights.float().cpu().contiguous()
        save_artifact(self._file(stream, number), tensors, {}, durable=False)

    def routed(self, expert: int) -> Routed:
        """The tokens that are routed to an expert: by the original model if its inputs are recorded, because both streams need the same tokens."""
        stream = self.streams[-1]
        found = {number: self._read(CHOSEN, stream, number) for number in range(self.batches)}
        rows = {number: (chosen == expert).any(1).nonzero()[:, 0] for number, chosen in found.items()}
        if not self.gated:
            return Routed(rows)
        gates = {
            number: (self._read(GATES, stream, number) * (chosen == expert)).sum(1)[rows[number]]
            for number, chosen in found.items()
        }
        mean = torch.cat(list(gates.values())).square().mean().sqrt()
        # Without tokens, or with gates of zero, all tokens count alike.
        return Routed(rows, {number: gate / mean for number, gate in gates.items()} if mean > 0 else None)

    def sample(self, most: int) -> Routed:
        """About `most` tokens, or all if there are fewer, evenly spread over all tokens of the layer."""
        counts = [self._artifact(OWN, number).tensors[HIDDEN].shape[0] for number in range(self.batches)]
        step = max(1, sum(counts) // most)
        rows, start = {}, 0
        for number, count in enumerate(counts):
            rows[number] = torch.arange(-start % step, count, step, dtype=torch.int64, device="cpu")
            start += count
        return Routed(rows)

    def everything(self) -> Routed:
        """All tokens of the layer."""
        return self.sample(2**62)

    def read(self, tokens: Routed, device: str) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """The inputs of these tokens by stream, each fp32 (n, d), and their factors (n,) if they have some, some ROWS at a time."""
        held: dict[str, list[Tensor]] = {stream: [] for stream in self.streams}
        factors: list[Tensor] = []
        count = 0
        for number, rows in tokens.rows.items():
            if len(rows):
                for stream in self.streams:
                    held[stream].append(read_rows(self._artifact(stream, number).tensors[HIDDEN], rows))
                factors += [] if tokens.factors is None else [tokens.factors[number]]
                count += len(rows)
            if count >= ROWS or (count and number == max(tokens.rows)):
                inputs = {stream: torch.cat(parts).to(device) for stream, parts in held.items()}
                yield inputs, torch.cat(factors).to(device) if factors else None
                held, factors, count = {stream: [] for stream in self.streams}, [], 0

    def _read(self, what: str, stream: str, number: int) -> Tensor:
        return read_tensor(self._artifact(stream, number).tensors[what])

    def _artifact(self, stream: str, number: int) -> Artifact:
        artifact = load_artifact(self._file(stream, number))
        if artifact is None:
            raise HalfplateError(
                f"the file {str(self._file(stream, number))!r} is damaged or cannot be read by this machine; put OUT on storage that all machines share, and use --resume"
            )
        return artifact

    def _file(self, stream: str, number: int) -> Path:
        return self.folder / f"{stream}-{number:05d}.safetensors"


class _Reached(Exception):
    """Raised once the experts have received their input, which ends the run of the layer."""


@torch.no_grad()
def experts_call(
    blockwise: BlockwiseModel, index: int, batch: BlockInputs, name: str, block: nn.Module | None = None
) -> Call:
    """What the experts module `name` of layer `index` receives, as it is recorded (`Family.recorded`).

    block: another module that runs instead of the layer.
    Raises HalfplateError if the layer does not call it, or with values that are not finite.
    """
    inner = name.removeprefix(f"{blockwise.prefix}.{index}.")
    experts: Any = (blockwise.blocks[index] if block is None else block).get_submodule(inner)
    seen: list[Call] = []

    def reached(module: LinearExperts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(module.recorded(args, kwargs))
        raise _Reached

    hook = experts.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        blockwise.run_block(index, batch, block)
    except _Reached:
        pass
    finally:
        hook.remove()
    if not seen:
        raise HalfplateError(
            f"{name} never ran on the calibration tokens, so it has no input statistics; raise samples, or exclude it"
        )
    if not bool(seen[0].hidden.isfinite().all()):
        raise HalfplateError(
            f"{name}: its inputs are not finite on the calibration tokens; check that the original model works on this text, or pass another"
        )
    return seen[0]


def sums_of(
    inputs: ExpertInputs,
    tokens: Routed,
    statistic: Statistic,
    token_limit: float | None,
    device: str,
    through: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> InputStatistics:
    """Statistics of `tokens`, with cross moments if the original inputs are recorded.

    through: for each stream, what makes the input of a linear of an expert from that of the experts; None for the same input.
    """
    sums = Sums()
    for streams, factors in inputs.read(tokens, device):
        if through is not None:
            streams = {stream: through[stream](x) for stream, x in streams.items()}
        sums.add(streams[OWN].float(), statistic, streams.get(ORIGINAL), token_limit, factors)
    return sums.statistics()


def blended(routed: InputStatistics, everything: InputStatistics, d_in: int) -> InputStatistics:
    """The statistics of an expert: (n H_routed + d_in H_all) / (n + d_in), where n tokens were routed to it.

    So every expert has the statistics of at least d_in tokens, and one that no token reaches those of all tokens.

    everything: of all tokens of the layer.
    """
    share = routed.tokens / (routed.tokens + d_in)

    def mixed(own: Tensor | None, every: Tensor | None) -> Tensor | None:
        if own is None or every is None:
            return every
        return own.mul_(share).add_(every.to(own.dtype), alpha=1 - share)

    return replace(
        routed,
        diagonal=mixed(routed.diagonal, everything.diagonal),
        gram=mixed(routed.gram, everything.gram),
        cross=mixed(routed.cross, everything.cross),
    )


def down_input(
    experts: LinearExperts, linears: Mapping[str, tuple[Tensor, Tensor | None]]
) -> Callable[[Tensor], Tensor]:
    """What makes the input of the down projection of an expert. linears: weight and bias of its other linears by leaf name."""

    @torch.no_grad()
    def apply(x: Tensor) -> Tensor:
        outputs = {leaf: nn.functional.linear(x, *pair) for leaf, pair in linears.items()}
        return experts.activated(outputs.get("gate_proj"), outputs["up_proj"])

    return apply


@torch.no_grad()
def collect_layer(
    blockwise: BlockwiseModel,
    index: int,
    inputs: Sequence[BlockInputs],
    names: Sequence[str],
    statistic: Statistic,
    token_limit: float | None = None,
    gated: bool = False,
) -> tuple[dict[str, InputStatistics], list[BlockInputs]]:
    """`collect_block`, in which linears of experts have blended statistics. The model is in memory; its experts may be linears.

    gated: as in `ExpertInputs`.
    """
    prefix = f"{blockwise.prefix}.{index}."
    stages = expert_stages(names, [prefix + name for name in experts_of(blockwise.blocks[index])])
    inside = {name for stage in stages.values() for name in stage.names}
    plain = [name for name in names if name not in inside]
    found, outputs = collect_block(blockwise, index, inputs, plain, statistic, token_limit)
    for stage in stages.values():
        with TemporaryDirectory(prefix="halfplate-experts-") as folder:
            recorded = ExpertInputs(Path(folder), len(inputs), (OWN,), gated)
            for number, batch in enumerate(inputs):
                recorded.write(OWN, number, experts_call(blockwise, index, batch, stage.module))
            found |= _of_stage(blockwise, index, stage, recorded, statistic, token_limit)
    return found, outputs


def _of_stage(
    blockwise: BlockwiseModel,
    index: int,
    stage: ExpertStage,
    recorded: ExpertInputs,
    statistic: Statistic,
    token_limit: float | None,
) -> dict[str, InputStatistics]:
    experts: Any = blockwise.blocks[index].get_submodule(stage.module.removeprefix(f"{blockwise.prefix}.{index}."))
    found: dict[str, InputStatistics] = {}
    everything: InputStatistics | None = None
    for number, names in stage.experts.items():
        tokens, expert = recorded.routed(number), experts.expert(number)
        linears = {leaf: (linear.weight, linear.bias) for leaf, linear in expert.named_children()}
        device = str(expert.up_proj.weight.device)

        def sums(rows: Routed, through: Any, device: str = device) -> InputStatistics:
            return sums_of(recorded, rows, statistic, token_limit, device, through)

        down = {OWN: down_input(experts, {leaf: pair for leaf, pair in linears.items() if leaf != "down_proj"})}
        first: InputStatistics | None = None
        for name in names:
            width = expert.get_submodule(name.rpartition(".")[2]).in_features
            if name.endswith(".down_proj"):
                found[name] = blended(sums(tokens, down), sums(recorded.sample(SAMPLED * width), down), width)
            else:
                everything = everything or sums(recorded.everything(), None)
                first = first or blended(sums(tokens, None), everything, width)
                found[name] = first
    return found
