"""Measure a method: time, FLOPs and bytes of a training step, and its variance shift."""

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
"""Steps that are timed together, since the cost of a step varies where whole batches drop."""

SHIFT_BATCHES = 2
SHIFT_REPEATS = 4
"""Training passes over each of these batches. They take a second or two for each method, in a
comparison of five minutes. Where whole batches drop, the shift is then the mean of 8 draws."""


@dataclass(frozen=True)
class Cost:
    """The mean FLOPs of a training step, and the bytes that it keeps for backward."""

    flops: float
    saved_bytes: float


class Subject:
    """A network with a method applied, with an optimizer and batches for training steps."""

    def __init__(
        self, model: nn.Module, applied: Applied, batches: Batches, recipe: Recipe, device: str
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).train()
        self.applied = applied
        self.batches = batches
        self.optimizer = make_optimizer(model, recipe)
        for group in self.optimizer.param_groups:
            # Small, so that no network diverges while it is timed; the cost does not depend on it.
            group["lr"] = 1e-4

    def steps(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return ``count`` batches: the full batches of an epoch, repeated if there are fewer."""
        full = [batch for batch in self.batches if len(batch[1]) >= self.batches.batch_size]
        found = full or list(self.batches)[:1]
        return [
            (images.to(self.device), labels.to(self.device))
            for images, labels in islice(cycle(found), count)
        ]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        return loss_of(self.model, *self.applied.batch(images, labels))

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take a training step: forward, backward and optimizer."""
        loss = self.forward(images, labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def count_step(subject: Subject, steps: int, seed: int) -> Cost:
    """Return the mean FLOPs and bytes over ``steps`` training steps, with draws from ``seed``."""
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
    """Return the milliseconds of a training step of each subject, measured side by side.

    In each round every subject takes a few steps on the same batches, and each round begins with
    another subject, so that other load on the machine affects all of them alike. The figure is the
    median over rounds of the mean step.
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
    """A network that applies the change of the batch itself, for methods that change the batch."""

    def __init__(self, model: nn.Module, applied: Applied) -> None:
        super().__init__()
        self.model = model
        self.applied = applied

    def forward(self, images: Any) -> Tensor:
        if isinstance(images, fx.Proxy):
            # torch.fx would record the method's counts, which are not kept in a module.
            raise TypeError("the change of a batch cannot be traced by torch.fx")
        if self.training:
            images, _ = self.applied.batch(images, torch.zeros(len(images), device=images.device))
        return self.model(images)  # type: ignore[no-any-return]


def largest_shift(subject: Subject) -> float | None:
    """Return the variance shift at the BatchNorm where it is furthest from 1.

    The shift is the ratio of the variance of the input in training, with the method at work, to
    that in evaluation, over a few training batches. None for a network without BatchNorm, or where
    the shift cannot be measured.
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
        # For example a subsample without rows. A missing shift must not end the comparison.
        return None
    known = [layer for layer in found.batch_norms if not math.isnan(layer.ratio)]
    return max(known, key=lambda layer: layer.shift).ratio if known else None
