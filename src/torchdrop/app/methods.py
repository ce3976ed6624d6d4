"""What is compared: the registry of methods, and how each one changes a network.

To add a method, write a function that builds it and register it with one line of summary and a
default ``p`` that was measured (docs/design-notes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _NeverCalled

import torchdrop
from torchdrop.schedules import check_rate

from .errors import UserError, one_line

__all__ = ["METHODS", "Applied", "Method", "rates", "register"]


class Applied:
    """A method at work on one network: what training has to know of it.

    The base class is the method that does nothing.
    """

    asked: float | None = None
    """The mean drop rate that was asked for, or None where nothing is dropped."""

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch to train on in place of the one that came. Called in training only."""
        return images, labels

    def observed(self) -> float | None:
        """The drop rate that training really delivered since the last call."""
        return None


Build = Callable[[nn.Module, float], Applied]


@dataclass(frozen=True)
class Method:
    """A way to regularise.

    Attributes:
        name: What the user types.
        summary: One line on what it does.
        build: Changes a network in place, given ``p``.
        p: The default of ``p``. None: it has none, or it follows another method.
        costs_like: The method whose FLOPs it is to have: ``p`` is then measured, 1 - FLOPs of that
            method / FLOPs of ``none``, unless the user gives it by name.
    """

    name: str
    summary: str
    build: Build
    p: float | None = None
    costs_like: str | None = None


METHODS: dict[str, Method] = {}
"""All methods, in the order of the table."""


def register(method: Method) -> None:
    """Add a method to :data:`METHODS`."""
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    METHODS[method.name] = method


def rates(
    methods: Sequence[str], given: Sequence[str], defaults: Mapping[str, float] | None = None
) -> dict[str, float | None]:
    """The ``p`` of each method: what was given for it, else for all, else its default.

    Args:
        methods: Names of methods.
        given: What the user typed: ``"0.3"`` for all methods, ``"dropout=0.3"`` for one.
        defaults: Defaults that go before the methods' own.

    Returns:
        ``p`` by method; None where there is none, or where it is to be measured.

    Raises:
        UserError: An entry that names no method of ``methods``, or no probability.
    """
    general: float | None = None
    single: dict[str, float] = {}
    for entry in given:
        name, equals, number = entry.rpartition("=")
        if equals and name not in methods:
            raise UserError(
                f"--p {entry}: {name!r} is not among the methods compared: {', '.join(methods)}"
            )
        if equals and name == "none":
            raise UserError(f"--p {entry}: the method 'none' has no p")
        try:
            p = check_rate(float(number), "p")
        except ValueError as error:
            raise UserError(
                f"--p {entry}: p has to be a number between 0 and 1, "
                f"as in --p 0.3 or --p dropout=0.3"
            ) from error
        if equals:
            single[name] = p
        else:
            general = p
    result: dict[str, float | None] = {}
    for name in methods:
        default = (defaults or {}).get(name, METHODS[name].p)
        if default is not None and general is not None:
            default = general
        result[name] = single.get(name, default)
    return result


def _none(model: nn.Module, p: float) -> Applied:
    return Applied()


class _Dropout(Applied):
    """nn.Dropout as a hook in front of a layer, so that the layer's parameters keep their names.

    It counts what it drops: values that were not zero before, and are after.
    """

    def __init__(self, p: float) -> None:
        self.asked = p
        self.p = p
        self.counts: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not module.training:
            return inputs
        output = F.dropout(inputs[0], self.p)
        # Counted where the activations are: reading the numbers here would wait for the device.
        seen = torch.count_nonzero(inputs[0].detach())
        counts = torch.stack([seen, seen - torch.count_nonzero(output.detach())])
        self.counts = counts if self.counts is None else self.counts + counts
        return (output, *inputs[1:])

    def observed(self) -> float | None:
        seen, dropped = (0, 0) if self.counts is None else self.counts.tolist()
        self.counts = None
        return dropped / seen if seen else None


def _dropout(model: nn.Module, p: float) -> Applied:
    # The projection inside nn.MultiheadAttention is a Linear that is never called.
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and not isinstance(module, _NeverCalled)
    ]
    if not linears:
        raise UserError(
            "dropout goes in front of the last nn.Linear of a network, and this one has none; "
            "leave dropout out of --methods"
        )
    dropout = _Dropout(p)
    linears[-1].register_forward_pre_hook(dropout)
    return dropout


class _PlanApplied(Applied):
    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.asked = fmean(block.p for block in plan.blocks)

    def observed(self) -> float | None:
        delivered: Mapping[str, float] = self.plan.observed()
        return fmean(delivered.values()) if delivered else None


def _stochastic_depth(model: nn.Module, p: float, **options: Any) -> Applied:
    try:
        plan = torchdrop.add_stochastic_depth(model, p, schedule="linear", **options)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return _PlanApplied(plan)


def _drop_path(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="row", sampling="independent", compute="mask")


def _stochastic_depth_row(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="row", sampling="exact")


def _stochastic_depth_batch(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="batch", scale="eval")


class _Subsample(Applied):
    """Trains on a random subset of each batch, of a size rounded at random to the exact mean."""

    def __init__(self, p: float) -> None:
        self.asked = p
        self.seen = 0
        self.kept = 0

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(labels)
        index = torch.randperm(batch)[: self._size(batch)]
        self.seen += batch
        self.kept += len(index)
        index = index.to(labels.device)
        return images[index], labels[index]

    def _size(self, batch: int) -> int:
        wanted = batch * (1.0 - float(self.asked or 0.0))
        # BatchNorm may not take a single image: below two, it is two of them or none at all.
        smallest = min(2, batch)
        if wanted < smallest:
            return smallest * int(float(torch.rand((), dtype=torch.float64)) < wanted / smallest)
        whole = int(wanted)
        return whole + int(float(torch.rand((), dtype=torch.float64)) < wanted - whole)

    def observed(self) -> float | None:
        seen, kept = self.seen, self.kept
        self.seen = self.kept = 0
        return 1.0 - kept / seen if seen else None


def _subsample(model: nn.Module, p: float) -> Applied:
    return _Subsample(p)


register(Method("none", "the network as it is", _none))
register(Method("dropout", "nn.Dropout in front of the last linear layer", _dropout, p=0.3))
register(
    Method(
        "drop_path",
        "each sample drops its own branches by a mask: every branch is computed in full",
        _drop_path,
        p=0.5,
    )
)
register(
    Method(
        "stochastic_depth_row",
        "each sample drops its own branches, and only what is kept is computed",
        _stochastic_depth_row,
        p=0.5,
    )
)
register(
    Method(
        "stochastic_depth_batch",
        "the whole batch drops a branch, as in the paper",
        _stochastic_depth_batch,
        p=0.5,
    )
)
register(
    Method(
        "subsample",
        "control: leaves out whole samples, to the FLOPs of stochastic_depth_row",
        _subsample,
        costs_like="stochastic_depth_row",
    )
)
