"""Recovery: training the compressed model, with fixed masks, towards the next-token distributions of the original."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from halfplate.errors import HalfplateError
from halfplate.formats import WeightSpec
from halfplate.formats.linear import assembled
from halfplate.models.experts import recognised
from halfplate.models.experts.routers import router_parameters
from halfplate.models.linears import find_linears
from halfplate.models.sources import Source, skeleton
from halfplate.precision import products
from halfplate.recovery.loss import divergence, square_head
from halfplate.recovery.settings import ROUTER, Recovery
from halfplate.recovery.state import State
from halfplate.recovery.trainable import TrainableLinear, trainable

WARMUP = 0.03  # share of the training in which the learning rate rises; then it falls to 0 along a cosine
SMOOTHING = 0.9  # smoothing of the loss that is shown


@dataclass
class Progress:
    """The progress of a recovery: steps and tokens done, seconds spent in all its runs, and the smoothed loss."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None


def check_trainable(original: Source, specs: Mapping[str, WeightSpec], settings: Recovery) -> None:
    """Raise HalfplateError if a model made of `original`, with the matrices `specs`, has nothing to train under `settings`."""
    if settings.train == ROUTER and not list(router_parameters(skeleton(original))):
        raise _nothing_to_train(settings)
    added = any(spec.trains_beside_core for spec in specs.values())
    if settings.train == "wrappers" and not settings.norms and not added:
        raise _nothing_to_train(settings)


def _nothing_to_train(settings: Recovery) -> HalfplateError:
    if settings.train == ROUTER:
        return HalfplateError(
            f"train={settings.train!r}: the model has no router of experts, or none of a known form; pass --train all"
        )
    return HalfplateError(
        f"train={settings.train!r}: the model has no wrappers and no norms to train; pass --train all"
    )


@contextmanager
def in_training(student: Any, settings: Recovery) -> Iterator[dict[str, nn.Parameter]]:
    """Context manager in which the student's linears are trainable; yields the parameters to train by name.

    Raises HalfplateError if there is nothing to train, as in a model whose norms have no weights.
    """
    student.requires_grad_(False)
    with torch.enable_grad(), _linears(student, settings) as linears:
        if settings.train == ROUTER:
            for parameter in router_parameters(student):
                parameter.requires_grad_(True)
        elif settings.norms:
            _enable_norms(student, linears)
        if not linears and settings.train == "all":
            _enable_linears(student)
        parameters = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
        if not parameters:
            raise _nothing_to_train(settings)
        yield parameters
        for parameter in parameters.values():
            if not bool(parameter.isfinite().all()):
                raise HalfplateError(
                    f"learning_rate={settings.learning_rate}: the training diverged; try a tenth of it"
                )
    student.requires_grad_(False)


@contextmanager
def _linears(student: Any, settings: Recovery) -> Iterator[dict[str, TrainableLinear]]:
    """Context manager in which compressed linears are trainable, by name; for routers alone, they only pass on gradients."""
    if settings.train == ROUTER:
        with assembled(student):
            yield {}
    else:
        with trainable(student, values_too=settings.train == "all") as linears:
            yield linears


def _enable_linears(student: Any) -> None:
    """Enable gradients of the linears in the layers of a model that is not compressed, those of experts included."""
    for found in find_linears(student)[0]:
        student.get_submodule(found.name).weight.requires_grad_(True)
    for name in recognised(student):  # experts in 3-D tensors
        student.get_submodule(name).requires_grad_(True)


def _enable_norms(student: Any, linears: dict[str, TrainableLinear]) -> None:
    """Enable gradients of all vectors outside the compressed matrices, and of their biases."""
    inside = {id(parameter) for linear in linears.values() for parameter in linear.parameters()}
    for parameter in student.parameters():
        if parameter.ndim == 1 and id(parameter) not in inside:
            parameter.requires_grad_(True)
    for linear in linears.values():
        if linear.bias is not None:
            linear.bias.requires_grad_(True)


def train(
    student: Any,
    teacher: Any,
    windows: Tensor,
    parameters: dict[str, nn.Parameter],
    settings: Recovery,
    accelerator: Accelerator,
    state: State | None,
    save: Callable[[State], None],
    save_seconds: float,
    report: Callable[[Progress, float], None],
) -> Progress:
    """Train `parameters` of the student in place until the tokens or minutes of `settings` are used up.

    With `tokens`, the result does not depend on interruptions, bit for bit.

    windows: int64 (windows, L) to train on, the same in every process; each process takes its share of a batch.
    state: the state that an interrupted run passed to `save`.
    save: called about every `save_seconds`, in the main process.
    report: called after each step with the progress and the share of the work that is done, in 0..1.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    if settings.batch % processes:
        raise HalfplateError(f"batch={settings.batch} is not a multiple of the {processes} processes; try {processes}")
    optimizer = _optimizer(parameters, settings.learning_rate)
    progress = Progress() if state is None else _restore(state, parameters, optimizer)
    model = accelerator.prepare_model(student) if processes > 1 else student
    order = _Order(len(windows), settings.seed)
    share = settings.batch // processes
    start = time.monotonic() - progress.seconds
    saved = progress.seconds
    while (done := _done(progress, settings)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * _rate(done)
        first = progress.steps * settings.batch + rank * share
        batch = windows[order.window(first, first + share)].to(accelerator.device)
        optimizer.zero_grad()
        loss = _loss(model, teacher, batch, settings, accelerator.device.type)
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

        # The clock of the main process counts for all, so that all stop at the same step.
        told = torch.tensor([time.monotonic() - start, float(loss.detach())], dtype=torch.float64, device="cpu")
        seconds, seen = broadcast(told.to(accelerator.device)).tolist() if processes > 1 else told.tolist()
        if not math.isfinite(seen):
            raise HalfplateError(f"learning_rate={settings.learning_rate}: the loss became {seen}; try a tenth of it")
        progress.steps, progress.seconds = progress.steps + 1, seconds
        progress.tokens += settings.batch * windows.shape[1]
        progress.loss = seen if progress.loss is None else SMOOTHING * progress.loss + (1 - SMOOTHING) * seen
        report(progress, _done(progress, settings))
        # Also after the last step: if the result cannot be written (e.g. the disk is full), nothing has to be trained again.
        if (seconds - saved >= save_seconds or _done(progress, settings) >= 1) and accelerator.is_main_process:
            saved = seconds
            save(_state(progress, parameters, optimizer))
    return progress


def _optimizer(parameters: dict[str, nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with a separate learning rate for each tensor, relative to its root mean square."""
    groups = [
        {"params": [parameter], "highest": learning_rate * max(1e-3, float(parameter.detach().square().mean().sqrt()))}
        for parameter in parameters.values()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _done(progress: Progress, settings: Recovery) -> float:
    """The share of the work that is done, in 0..1."""
    if settings.tokens is not None:
        return min(1.0, progress.tokens / settings.tokens)
    assert settings.minutes is not None
    return min(1.0, progress.seconds / (60 * settings.minutes))


def _rate(done: float) -> float:
    """The learning rate as a share of its peak."""
    if done < WARMUP:
        return max(0.1, done / WARMUP)
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def _loss(model: Any, teacher: Any, batch: Tensor, settings: Recovery, device: str) -> Tensor:
    """The loss of a batch int64 (samples, L). The last token also counts, because the teacher predicts its successor."""
    features = settings.square_head > 0
    with products(settings.precision, device):
        with torch.no_grad():
            target = teacher(input_ids=batch, use_cache=False, output_hidden_states=features)
        found = model(input_ids=batch, use_cache=False, output_hidden_states=features)
    loss = divergence(found.logits.flatten(0, 1), target.logits.flatten(0, 1))
    if features:
        # The first hidden state is the embedding, which does not differ.
        loss = loss + settings.square_head * square_head(found.hidden_states[1:], target.hidden_states[1:])
    return loss


class _Order:
    """The index of the k-th window: every window once per epoch, in a different order in each."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.epochs: dict[int, list[int]] = {}

    def window(self, first: int, last: int) -> list[int]:
        return [self._epoch(k // self.count)[k % self.count] for k in range(first, last)]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self.epochs:
            generator = torch.Generator().manual_seed((self.seed * 100_003 + epoch) % 2**63)
            self.epochs = {
                epoch: torch.randperm(self.count, generator=generator, dtype=torch.int64, device="cpu").tolist()
            } | {old: order for old, order in self.epochs.items() if old == epoch - 1}
        return self.epochs[epoch]


def _state(progress: Progress, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    tensors = {f"value.{name}": parameter.detach().cpu() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, tensor in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = tensor.detach().cpu()
    return State(tensors, {"progress": vars(progress).copy()})


@torch.no_grad()
def _restore(state: State, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    keys = ("step", "exp_avg", "exp_avg_sq")
    for name, parameter in parameters.items():
        parameter.copy_(state.tensors[f"value.{name}"])
        optimizer.state[parameter] = {
            key: state.tensors[f"{key}.{name}"].to(torch.device("cpu") if key == "step" else parameter.device)
            for key in keys
        }
    return Progress(**state.facts["progress"])
