"""Methods as hooks on modules of a network, which count what they drop.

A hook leaves the names of all parameters as they are, unlike a layer put around a module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .registry import Applied

__all__ = ["HookedMethod", "ModuleHook", "count_dropped_values"]


class ModuleHook:
    """A method at one module: a forward pre-hook that changes its input, or a hook for its output.

    What is dropped is counted on the device of the activations and read later, since reading a
    number at each call would wait for the device.

    Args:
        name: The name of the method, for errors.
        change: Called with a tensor and ``training=``; returns the tensor that replaces it.
        count: Called with the tensor before and after; returns how many values (or rows) there
            were and how many of them were dropped. None for a method that drops nothing.
    """

    def __init__(
        self,
        name: str,
        change: Callable[..., Tensor],
        count: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.name = name
        self.change = change
        self.count = count
        self.calls = 0
        self.counts: Tensor | None = None

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], output: Any = None
    ) -> Tensor | tuple[Any, ...] | None:
        """Return the changed input or output, as torch expects it of a hook."""
        before = output is None
        x = inputs[0] if before else output
        if not isinstance(x, Tensor):
            side = "input" if before else "output"
            raise UserError(
                f"{self.name} changes the {side} of a {type(module).__name__}, which has to be a "
                f"tensor, but it is a {type(x).__name__}; leave {self.name} out of --methods"
            )
        new = self.change(x, training=module.training)
        if module.training:
            self.calls += 1
            if self.count is not None:
                counts = torch.stack(self.count(x.detach(), new.detach()))
                self.counts = counts if self.counts is None else self.counts + counts
        return (new, *inputs[1:]) if before else new

    def observed(self) -> float | None:
        """Return the share that was dropped since the last call; None if nothing was counted."""
        seen, dropped = (0, 0) if self.counts is None else self.counts.tolist()
        self.counts = None
        return dropped / seen if seen else None


class HookedMethod(Applied):
    """A method applied by hooks, at one or more modules."""

    def __init__(self, asked: float | None, hooks: Sequence[ModuleHook]) -> None:
        self.asked = asked
        self.hooks = list(hooks)

    @property
    def reached(self) -> bool:
        """Whether a hook has been called in training."""
        return any(hook.calls for hook in self.hooks)

    def observed(self) -> float | None:
        """Return the mean drop rate over the hooks."""
        rates = [rate for hook in self.hooks if (rate := hook.observed()) is not None]
        return fmean(rates) if rates else None


def count_dropped_values(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many values were not zero before, and how many of them are zero after."""
    seen = torch.count_nonzero(x)
    return seen, seen - torch.count_nonzero(new)
