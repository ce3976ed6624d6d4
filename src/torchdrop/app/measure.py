"""What each method costs and shifts: time, FLOPs and bytes of a step; variance at BatchNorms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.cost import FlopCounter, SavedBytes
from torchdrop.diagnostics import variance_shift
from torchdrop.internals import BatchNormBase

from .data import Batches
from .loss import loss_of
from .methods import Applied
from .recipe import Recipe
from .timing import in_turn
from .training import make_optimizer

__all__ = ["Cost", "Subject", "count_step", "largest_shift", "time_steps"]

WARM_UP = 1
STEPS_A_ROUND = 2
"""Steps timed together: what whole-batch dropping leaves out varies from step to step."""

SHIFT_BATCHES = 2
SHIFT_REPEATS = 4
"""Training passes of each of these batches. More of them take longer than they tell: a second or
two a method, of a whole run of five minutes. Whole-batch dropping is then the mean of 8 draws."""


@dataclass(frozen=True)
class Cost:
    """The mean training step: floating point operations, and bytes kept for backward."""

    flops: float
    saved_bytes: float


class Subject:
    """A network with a method applied, an optimizer, and batches to take steps on."""

    def __init__(
        self, model: nn.Module, applied: Applied, batches: Batches, recipe: Recipe, device: str
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).train()
        self.applied = applied
        self.batches = batches
        self.optimizer = make_optimizer(model, recipe)
        for group in self.optimizer.param_groups:
            # The cost of a step does not depend on it, and no network diverges while it is timed.
            group["lr"] = 1e-4

    def steps(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first ``count`` full batches, as often as it takes."""
        full = [batch for batch in self.batches if len(batch[1]) >= self.batches.batch_size]
        found = full or list(self.batches)[:1]
        return [
            (images.to(self.device), labels.to(self.device))
            for images, labels in islice(cycle(found), count)
        ]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        return loss_of(self.model, *self.applied.batch(images, labels))

    def step(self, images: Tensor, labels: Tensor) -> None:
        """A whole training step."""
        loss = self.forward(images, labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def count_step(subject: Subject, steps: int, seed: int) -> Cost:
    """FLOPs and bytes of a step: the mean over ``steps`` of them, all drawn from ``seed``."""
    torch.manual_seed(seed)
    flops, saved = [], []
    for images, labels in subject.steps(steps):
        with FlopCounter() as counter:
            with SavedBytes() as bytes_kept:
                loss = subject.forward(images, labels)
            subject.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        subject.optimizer.step()
        flops.append(counter.total)
        saved.append(bytes_kept.total)
    return Cost(fmean(flops), fmean(saved))


def time_steps(subjects: dict[str, Subject], rounds: int, seed: int) -> dict[str, float]:
    """The milliseconds of a training step of each subject, measured side by side.

    In each round every subject takes a few steps on the same batches, one subject after the other
    and another one first each round, so that whatever else the machine does meets all of them. The
    figure is the median over rounds of the mean step.
    """
    torch.manual_seed(seed)

    def some_steps(subject: Subject) -> Callable[[], None]:
        batches = subject.steps(STEPS_A_ROUND)

        def run() -> None:
            for images, labels in batches:
                subject.step(images, labels)

        return run

    runs = {name: some_steps(subject) for name, subject in subjects.items()}
    device = next(iter(subjects.values())).device
    taken = list(islice(in_turn(runs, device), WARM_UP + rounds))[WARM_UP:]
    return {name: median(times[name] for times in taken) / STEPS_A_ROUND for name in subjects}


class _AsTrained(nn.Module):
    """A network with a method that changes the batch, as a network that does so itself."""

    def __init__(self, model: nn.Module, applied: Applied) -> None:
        super().__init__()
        self.model = model
        self.applied = applied

    def forward(self, images: Any) -> Tensor:
        if isinstance(images, fx.Proxy):
            # what is done to a batch keeps count on an object that is no module
            raise TypeError("the batch of a method cannot be traced")
        if self.training:
            images, _ = self.applied.batch(images, torch.zeros(len(images), device=images.device))
        return self.model(images)  # type: ignore[no-any-return]


def largest_shift(subject: Subject) -> float | None:
    """The ratio of variances, training / evaluation, at the BatchNorm where it is furthest from 1.

    On a few training batches, as the method has them in training. None for a network without
    BatchNorm, or where it cannot be measured.
    """
    if not any(isinstance(module, BatchNormBase) for module in subject.model.modules()):
        return None
    torch.manual_seed(0)
    batches = [images for images, _ in subject.steps(SHIFT_BATCHES)]
    try:
        found = variance_shift(
            _AsTrained(subject.model, subject.applied), batches, repeats=SHIFT_REPEATS
        )
    except (RuntimeError, ValueError, TypeError):
        # An empty or a single-row subsample, say. The runs that are finished count more.
        return None
    known = [layer for layer in found.batch_norms if not math.isnan(layer.ratio)]
    return max(known, key=lambda layer: layer.shift).ratio if known else None
