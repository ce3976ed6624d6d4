"""Find out whether BatchNorm can normalise a single row.

BatchNorm needs more than one value a channel. How many it gets from one row depends on the layers
before it: one, after a global pooling, however large the map of the shortcut is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchdrop.tracing.operations import named

__all__ = ["BatchNormInputs", "RowValues", "sizes_of_row"]


class RowValues(NamedTuple):
    """How many values a channel a BatchNorm gets from a single row.

    Attributes:
        fewest: The fewest values for a row that any BatchNorm of the branch got in a call.
        sizes: The sizes of the shortcut in that call, without the batch.
    """

    fewest: int
    sizes: tuple[int, ...]

    def suffice(self, sizes: tuple[int, ...]) -> bool:
        """Whether BatchNorm can normalise a single row of a call with a shortcut of ``sizes``.

        Nothing is known of a shortcut that is smaller than the one that was measured.
        """
        if self.fewest < 2 or len(sizes) != len(self.sizes):
            return False
        return all(now >= known for now, known in zip(sizes, self.sizes, strict=True))


class BatchNormInputs(TorchFunctionMode):
    """Records how many values a channel each BatchNorm gets that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if named(getattr(func, "__name__", "")).batch_norm:
            x = args[0] if args else kwargs["input"]
            self._counts.append(x.numel() // x.shape[1])
        return func(*args, **kwargs)

    def for_one_row(self, skip: Tensor, dim: int, before: RowValues | None) -> RowValues | None:
        """Return what was recorded, or ``before`` if that is fewer; None if no BatchNorm ran.

        Args:
            skip: The shortcut of the call.
            dim: The dimension that carries its rows.
            before: What other calls have shown.
        """
        if not self._counts:
            return before
        now = RowValues(min(self._counts) // max(skip.shape[dim], 1), sizes_of_row(skip, dim))
        return now if before is None or now.fewest <= before.fewest else before


def sizes_of_row(skip: Tensor, dim: int) -> tuple[int, ...]:
    """Return the sizes of ``skip`` without the dimension ``dim``, which carries the rows."""
    return (*skip.shape[:dim], *skip.shape[dim + 1 :])
