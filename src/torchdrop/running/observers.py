"""The events that a site reports to its observers: each residual sum, as it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

__all__ = ["Observer", "ObserverHandle", "SumEvent"]


@dataclass(frozen=True, eq=False)
class SumEvent:
    """One residual sum that was just computed.

    The model continues with these tensors, so an observer must not write into them.

    Attributes:
        index: The number of the branch among the branches of its site, from 0.
        skip: The other term of the sum. If the block adds in place, the sum was written into it.
        total: The sum.
        rows: The kept rows: True if all rows were kept, False if none was, else their indices, on
            the host and in no particular order. True in evaluation.
        batch: The number of rows of the batch.
    """

    index: int
    skip: Tensor
    total: Tensor
    rows: Tensor | bool
    batch: int


Observer = Callable[[SumEvent], Any]


class ObserverHandle:
    """Registers an observer until :meth:`remove` is called; also a context manager."""

    def __init__(self, observers: list[Observer], observer: Observer) -> None:
        self._observers: list[Observer] | None = observers
        self._observer = observer
        observers.append(observer)

    def remove(self) -> None:
        """End the observation. A second call has no effect."""
        if self._observers is not None:
            self._observers.remove(self._observer)
            self._observers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
