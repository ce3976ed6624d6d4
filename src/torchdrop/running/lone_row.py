"""Find out whether BatchNorm can normalise a single row.

BatchNorm needs more than one value a channel. How many it gets from one row depends on the layers
before it: one, after a global pooling, however large the map of the shortcut is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchdrop.tracing.operations import named

__all__ = ["BatchNormInputs", "RowValues"]

# How many values a channel are enough for a smaller input, for which their number is estimated.
_ENOUGH = 4


class RowValues(NamedTuple):
    """How many values a channel a BatchNorm gets from a single row.

    Attributes:
        fewest: The fewest values for a row that any BatchNorm of the branch got in a call.
        positions: How many positions a channel of the shortcut had in that call.
    """

    fewest: int
    positions: int

    def suffice(self, skip: Tensor, batch: int) -> bool:
        """Whether BatchNorm can normalise a single row of a call with the shortcut ``skip``.

        If its map is smaller than in the call that was measured, the map in front of the BatchNorm
        is assumed to be smaller by the same factor.
        """
        if self.fewest < 2:
            return False
        positions = _positions(skip, batch)
        return positions >= self.positions or self.fewest * positions >= _ENOUGH * self.positions


class BatchNormInputs(TorchFunctionMode):
    """Records how many values a channel each BatchNorm gets that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if named(getattr(func, "__name__", "")).batch_norm:
            x = args[0] if args else kwargs["input"]
            self._values.append(x.numel() // x.shape[1])
        return func(*args, **kwargs)

    def for_one_row(self, skip: Tensor, batch: int, before: RowValues | None) -> RowValues | None:
        """Return what was recorded, or ``before`` if that is fewer; None if no BatchNorm ran.

        Args:
            skip: The shortcut of the call.
            batch: The number of rows.
            before: What other calls have shown.
        """
        if not self._values:
            return before
        now = RowValues(min(self._values) // max(batch, 1), max(_positions(skip, batch), 1))
        return now if before is None else min(now, before, key=lambda v: v.fewest / v.positions)


def _positions(skip: Tensor, batch: int) -> int:
    """Return how many positions a channel of one row of ``skip`` has."""
    return skip.numel() // max(batch * skip.shape[1], 1)
